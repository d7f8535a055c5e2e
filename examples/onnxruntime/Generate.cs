// Continue a prompt with an ONNX artifact, in C#:
//
//   dotnet run -- OpenELM-450M-onnx-int4 "Once upon a time" 40
//
// NOT COMPILED OR RUN by this project's tests, which only parse it. The same calls, on the same artifact, are run from Python.
using Microsoft.ML.OnnxRuntimeGenAI;

string folder = args[0], prompt = args[1];
int count = int.Parse(args[2]);

using var model = new Model(folder); // reads genai_config.json
using var tokenizer = new Tokenizer(model);
// The model wants the token that begins texts before the prompt.
tokenizer.UpdateOptions(new Dictionary<string, string> { ["add_special_tokens"] = "true" });
using var prompts = tokenizer.Encode(prompt);

using var parameters = new GeneratorParams(model);
parameters.SetSearchOption("max_length", prompts[0].Length + count);
parameters.SetSearchOption("do_sample", false); // greedy; true draws, with "temperature", "top_k" and "top_p"

using var generator = new Generator(model, parameters);
generator.AppendTokenSequences(prompts);
while (!generator.IsDone())
{
    generator.GenerateNextToken();
}
Console.WriteLine(tokenizer.Decode(generator.GetSequence(0)));
