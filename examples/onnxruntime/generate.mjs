// Continue a prompt with an ONNX artifact, in Node.js: npm install
//
//   node generate.mjs OpenELM-450M-onnx-int4 "Once upon a time" 40
//
// In a browser the same code runs on the files behind `env.localModelPath`, a URL there.
import { readdirSync } from 'node:fs';
import path from 'node:path';
import { env, pipeline } from '@huggingface/transformers';

const [folder, prompt, count] = process.argv.slice(2);
env.allowRemoteModels = false; // everything is in the folder
env.localModelPath = path.dirname(path.resolve(folder));

// transformers.js finds the model file by the name of its `dtype`.
const dtypes = { 'model.onnx': 'fp32', 'model_fp16.onnx': 'fp16', 'model_quantized.onnx': 'q8', 'model_q4.onnx': 'q4' };
const dtype = dtypes[readdirSync(path.join(folder, 'onnx')).find((name) => name in dtypes)];

const generate = await pipeline('text-generation', path.basename(folder), { dtype });
const [{ generated_text }] = await generate(prompt, { max_new_tokens: Number(count), do_sample: false });
console.log(generated_text);
