// Not compiled by the project that this comes from; see README.md.
import CoreML
import CryptoKit
import Foundation

/// A language model with a cache of the tokens it has read.
public protocol LanguageModel: AnyObject {
    /// Tokens that the cache holds at most, prompt and answer together.
    var context: Int { get }
    /// Tokens in the cache.
    var position: Int { get }
    /// Scores of the token that follows `tokens`, which follow what was read before.
    func read(_ tokens: [Int32]) throws -> [Float]
    /// Empties the cache.
    func reset()
}

public enum ArtifactError: LocalizedError {
    case refused(String)
    case contextFull(Int)

    public var errorDescription: String? {
        switch self {
        case .refused(let reason): reason
        case .contextFull(let context): "prompt and answer together exceed the context of \(context) tokens"
        }
    }
}

/// What this package reads of an artifact's `manifest.json`.
struct Manifest: Decodable {
    struct Settings: Decodable {
        let device: String
        let kv: String
        let argmax: Bool
    }
    struct Chain: Decodable {
        let packages: [Package]
        struct Package: Decodable { let file: String }
    }
    let settings: Settings
    let context: Int
    let chain: Chain?
}

/// Opens the artifact in `folder`, in the form that it has.
public func openLanguageModel(in folder: URL) async throws -> LanguageModel {
    let data = try Data(contentsOf: folder.appending(path: "manifest.json"))
    let manifest = try JSONDecoder().decode(Manifest.self, from: data)
    if manifest.chain != nil { throw ArtifactError.refused("the model is cut into several packages; export a smaller one") }
    if manifest.settings.argmax { throw ArtifactError.refused("the package gives no scores; export it without --argmax") }
    if manifest.settings.kv != "state" { throw ArtifactError.refused("the cache is an input; export it without --kv io") }
    let version = SHA256.hash(data: data).prefix(8).map { String(format: "%02x", $0) }.joined()
    let compiled = try await compiledPackage(in: folder, version: version)
    if manifest.settings.device == "gpu" { return try GPUModel(compiledAt: compiled, context: manifest.context) }
    return try NeuralEngineModel(compiledAt: compiled, context: manifest.context)
}

/// The package of the artifact, compiled for this device: once, then kept in the folder for caches under the artifact's `version`.
private func compiledPackage(in folder: URL, version: String) async throws -> URL {
    let files = FileManager.default
    let kept = URL.cachesDirectory.appending(path: "\(folder.lastPathComponent)-\(version).mlmodelc")
    if files.fileExists(atPath: kept.path) { return kept }
    let contents = try files.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
    guard let package = contents.first(where: { $0.pathExtension == "mlpackage" }) else {
        throw ArtifactError.refused("\(folder.lastPathComponent) holds no .mlpackage; was it added to the app as a folder?")
    }
    let compiled = try await MLModel.compileModel(at: package)
    try files.createDirectory(at: kept.deletingLastPathComponent(), withIntermediateDirectories: true)
    try files.moveItem(at: compiled, to: kept)
    return kept
}

/// An int32 input of `shape`.
func integers(_ values: [Int32], shape: [Int]) -> MLFeatureValue {
    MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: values, shape: shape))
}
