// Not compiled by the project that this comes from; see README.md.
import CoreML

/// A package for the Neural Engine: `prefill` reads a chunk of tokens, `decode` one; both keep the cache in one state.
final class NeuralEngineModel: LanguageModel {
    let context: Int
    private(set) var position = 0
    private let prefill: MLModel, decode: MLModel
    private var state: MLState
    private let chunk: Int
    private let scoreNames: [String]

    init(compiledAt url: URL, context: Int, units: MLComputeUnits = .cpuAndNeuralEngine) throws {
        func load(_ function: String) throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            configuration.functionName = function
            return try MLModel(contentsOf: url, configuration: configuration)
        }
        self.context = context
        prefill = try load("prefill")
        decode = try load("decode")
        state = decode.makeState()  // zeros; both functions use it
        let description = prefill.modelDescription
        chunk = description.inputDescriptionsByName["input_ids"]!.multiArrayConstraint!.shape[1].intValue
        // "logits", or "logits_0", "logits_1", … in the order of their numbers
        scoreNames = description.outputDescriptionsByName.keys.sorted { ($0.count, $0) < ($1.count, $1) }
    }

    func read(_ tokens: [Int32]) throws -> [Float] {
        guard position + tokens.count <= context else { throw ArtifactError.contextFull(context) }
        var scores: [Float] = []
        var start = 0
        while start < tokens.count {
            // A padded chunk must fit the cache; near its end tokens go one by one. Padding is overwritten before it is seen.
            let whole = tokens.count - start > 1 && position + chunk <= context
            let count = whole ? min(chunk, tokens.count - start) : 1
            let padding = [Int32](repeating: 0, count: whole ? chunk - count : 0)
            var inputs: [String: MLFeatureValue] = [
                "input_ids": integers(Array(tokens[start..<start + count]) + padding, shape: [1, whole ? chunk : 1]),
                "position": integers([Int32(position)], shape: [1]),
            ]
            if whole { inputs["last_token"] = integers([Int32(count - 1)], shape: [1]) }
            let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
            let output = try (whole ? prefill : decode).prediction(from: provider, using: state)
            scores = scoreNames.flatMap { name in
                MLShapedArray<Float>(converting: output.featureValue(for: name)!.multiArrayValue!).scalars
            }
            position += count
            start += count
        }
        return scores
    }

    func reset() {
        state = decode.makeState()
        position = 0
    }
}
