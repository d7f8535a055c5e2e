// Not compiled by the project that this comes from; see README.md.
import Foundation
import Tokenizers

/// A model and its tokenizer; texts are generated one at a time, off the main thread.
public actor Chat {
    private let model: LanguageModel
    private let tokenizer: Tokenizer
    private let ends: Set<Int>

    /// Opens the artifact in `folder`.
    public init(artifact folder: URL) async throws {
        model = try await openLanguageModel(in: folder)
        tokenizer = try await AutoTokenizer.from(modelFolder: folder)
        ends = try Self.ends(in: folder).union([tokenizer.eosTokenId].compactMap { $0 })
    }

    /// Continues `prompt`, or answers it where the model has a chat template; pieces of text as they come.
    public nonisolated func answer(to prompt: String, sampler: Sampler = Sampler(), count: Int = 256) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.generate(prompt, sampler, count) { piece in
                        continuation.yield(piece)
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func generate(_ prompt: String, _ sampler: Sampler, _ count: Int, _ emit: @Sendable (String) -> Void) throws {
        // The tokenizer puts the token that begins texts before a plain prompt.
        var ids = tokenizer.encode(text: prompt)
        if tokenizer.hasChatTemplate {
            ids = try tokenizer.applyChatTemplate(messages: [["role": "user", "content": prompt]])
        }
        model.reset()
        var scores = try model.read(ids.map { Int32($0) })
        var answer: [Int] = []
        var shown = ""
        while answer.count < count && model.position < model.context && !Task.isCancelled {
            let token = sampler.draw(from: scores)
            if ends.contains(Int(token)) { break }
            answer.append(Int(token))
            // Prompt and answer are decoded together, so that spaces are right; half a character is held back until the rest of it comes.
            let text = String(tokenizer.decode(tokens: ids + answer).dropFirst(tokenizer.decode(tokens: ids).count))
            if !text.hasSuffix("\u{FFFD}") {
                emit(String(text.dropFirst(shown.count)))
                shown = text
            }
            scores = try model.read([token])
        }
    }

    /// Ids that end a text: `eos_token_id` of `config.json`, a number or a list.
    private static func ends(in folder: URL) throws -> Set<Int> {
        let data = try Data(contentsOf: folder.appending(path: "config.json"))
        let config = try JSONSerialization.jsonObject(with: data) as? [String: Any]
        switch config?["eos_token_id"] {
        case let id as Int: return [id]
        case let ids as [Int]: return Set(ids)
        default: return []
        }
    }
}
