// Similarity: serves a text encoder with an adapter, compiled ahead of time by
// export_similarity.py, and prints the cosine similarity of each pair of texts. The adapter's
// layers are operators in the compiled graph; linking rankwise registers them.
#include <rankwise/rankwise.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

namespace {

const std::string missing = ": cannot be read";

/// Token ids and mask, [texts, tokens] int64; texts 2 i and 2 i + 1 are pair i.
std::vector<at::Tensor> read_pairs(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + missing);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto tensors = torch::pickle_load(bytes).toGenericDict();
  return {tensors.at("input_ids").toTensor(), tensors.at("attention_mask").toTensor()};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s MODEL PAIRS (as export_similarity.py writes them)\n", argv[0]);
    return 2;
  }
  try {
    if (!std::filesystem::exists(argv[1])) throw std::runtime_error(argv[1] + missing);
    const std::vector<at::Tensor> pairs = read_pairs(argv[2]);
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const at::Tensor vectors = model.run(pairs).at(0).unflatten(0, {-1, 2});
    const at::Tensor similarity = (vectors.select(1, 0) * vectors.select(1, 1)).sum(1);
    for (int64_t i = 0; i < similarity.size(0); ++i)
      std::printf("%.7f\n", similarity[i].item<double>());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
