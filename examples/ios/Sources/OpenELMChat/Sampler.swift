// Not compiled by the project that this comes from; see README.md.
import Foundation

/// Draws a token from scores: temperature, then the `topK` most likely, then the fewest whose probabilities sum to `topP`.
public struct Sampler: Sendable {
    public var temperature: Float
    public var topK: Int
    public var topP: Float

    /// A temperature of 0 takes the most likely token always.
    public init(temperature: Float = 0.7, topK: Int = 40, topP: Float = 0.95) {
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
    }

    public func draw(from scores: [Float]) -> Int32 {
        if temperature <= 0 {
            return Int32(scores.indices.max { scores[$0] < scores[$1] }!)
        }
        let best = scores.indices.sorted { scores[$0] > scores[$1] }.prefix(max(topK, 1))
        let largest = scores[best.first!]
        let weights = best.map { exp((scores[$0] - largest) / temperature) }
        let total = weights.reduce(0, +)
        var kept: [(token: Int, weight: Float)] = []
        var sum: Float = 0
        for (token, weight) in zip(best, weights) {
            kept.append((token, weight))
            sum += weight
            if sum >= topP * total { break }
        }
        var left = Float.random(in: 0..<sum)
        for (token, weight) in kept {
            left -= weight
            if left < 0 { return Int32(token) }
        }
        return Int32(kept.last!.token)
    }
}
