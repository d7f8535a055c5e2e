// Not compiled by the project that this comes from; see README.md.
// openelm FOLDER PROMPT [TOKENS]: continues the prompt, greedily.
import Foundation
import OpenELMChat

let arguments = CommandLine.arguments
guard arguments.count >= 3 else {
    print("usage: openelm FOLDER PROMPT [TOKENS]")
    exit(2)
}
let chat = try await Chat(artifact: URL(filePath: arguments[1]))
let count = arguments.count > 3 ? Int(arguments[3]) ?? 128 : 128
for try await piece in chat.answer(to: arguments[2], sampler: Sampler(temperature: 0), count: count) {
    print(piece, terminator: "")
    fflush(stdout)
}
print()
