// Not compiled by the project that this comes from; see README.md.
import SwiftUI

/// A conversation with the model in the folder `artifact`. Each message is answered by itself.
public struct ChatView: View {
    private let artifact: URL
    @State private var chat: Chat?
    @State private var lines: [Line] = []
    @State private var draft = ""
    @State private var running: Task<Void, Never>?
    @State private var problem: String?

    public init(artifact: URL) {
        self.artifact = artifact
    }

    private struct Line: Identifiable {
        let id = UUID()
        let mine: Bool
        var text: String
    }

    public var body: some View {
        VStack {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(lines) { line in
                        Text(line.text)
                            .padding(8)
                            .background(line.mine ? Color.accentColor.opacity(0.2) : Color.gray.opacity(0.15))
                            .clipShape(RoundedRectangle(cornerRadius: 8))
                            .frame(maxWidth: .infinity, alignment: line.mine ? .trailing : .leading)
                    }
                }
                .padding()
            }
            if let problem { Text(problem).foregroundStyle(.red).padding(.horizontal) }
            HStack {
                TextField("Message", text: $draft).textFieldStyle(.roundedBorder).onSubmit(send)
                if running == nil {
                    Button("Send", action: send).disabled(chat == nil || draft.isEmpty)
                } else {
                    Button("Stop") { running?.cancel() }
                }
            }
            .padding()
        }
        .overlay { if chat == nil && problem == nil { ProgressView("Opening the model") } }
        .task {
            do { chat = try await Chat(artifact: artifact) } catch { problem = error.localizedDescription }
        }
    }

    private func send() {
        guard let chat, running == nil, !draft.isEmpty else { return }
        let prompt = draft
        draft = ""
        problem = nil
        lines.append(Line(mine: true, text: prompt))
        lines.append(Line(mine: false, text: ""))
        let answer = lines.count - 1
        running = Task { @MainActor in
            do {
                for try await piece in chat.answer(to: prompt) { lines[answer].text += piece }
            } catch {
                problem = error.localizedDescription
            }
            running = nil
        }
    }
}
