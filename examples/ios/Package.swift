// swift-tools-version: 6.0
// Not compiled by the project that this comes from; see README.md.
import PackageDescription

let package = Package(
    name: "OpenELMChat",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "OpenELMChat", targets: ["OpenELMChat"]),
        .executable(name: "openelm", targets: ["openelm"]),
    ],
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.0")
    ],
    targets: [
        .target(name: "OpenELMChat", dependencies: [.product(name: "Tokenizers", package: "swift-transformers")]),
        .executableTarget(name: "openelm", dependencies: ["OpenELMChat"]),
    ],
    swiftLanguageModes: [.v5]
)
