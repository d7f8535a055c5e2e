// Not compiled by the project that this comes from; see README.md.
import CoreML

/// A package made with `--device gpu`: one function for any number of tokens.
final class GPUModel: LanguageModel {
    let context: Int
    private(set) var position = 0
    private let model: MLModel
    private var state: MLState

    init(compiledAt url: URL, context: Int, units: MLComputeUnits = .cpuAndGPU) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        self.context = context
        model = try MLModel(contentsOf: url, configuration: configuration)
        state = model.makeState()
    }

    func read(_ tokens: [Int32]) throws -> [Float] {
        let end = position + tokens.count
        guard end <= context else { throw ArtifactError.contextFull(context) }
        // The model is causal by itself: the mask's width says how many tokens the cache holds afterwards, its values hide nothing.
        let mask = MLShapedArray<Float16>(repeating: 0, shape: [1, 1, 1, end])
        let provider = try MLDictionaryFeatureProvider(dictionary: [
            "inputIds": integers(tokens, shape: [1, tokens.count]),
            "causalMask": MLFeatureValue(shapedArray: mask),
        ])
        let output = try model.prediction(from: provider, using: state)
        position = end
        let scores = MLShapedArray<Float>(converting: output.featureValue(for: "logits")!.multiArrayValue!)
        return scores[0][tokens.count - 1].scalars  // [1, tokens, vocab]
    }

    func reset() {
        state = model.makeState()
        position = 0
    }
}
