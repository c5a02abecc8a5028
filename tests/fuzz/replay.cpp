// Runs a fuzz target, without a fuzzer, over every file of a folder, each of its prefixes and each
// of its flipped bits.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

size_t runs = 0;

void run(const std::string& input) {
  // A copy of exactly this size, so that a sanitizer sees what is read beyond it.
  const std::vector<uint8_t> bytes(input.begin(), input.end());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  ++runs;
}

void run_neighbours(std::string input) {
  for (size_t size = 0; size <= input.size(); ++size) run(input.substr(0, size));
  for (size_t bit = 0; bit < 8 * input.size(); ++bit) {
    const auto flip = [&] { input[bit / 8] = static_cast<char>(input[bit / 8] ^ (1 << bit % 8)); };
    flip();
    run(input);
    flip();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    std::ifstream file(entry.path(), std::ios::binary);
    run_neighbours({std::istreambuf_iterator<char>(file), {}});
  }
  std::printf("%zu runs\n", runs);
  return runs == 0;
}
