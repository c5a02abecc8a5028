// A model's adapter: reads a PEFT folder and prints, for each adapted module, the size of its
// update.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s ADAPTER_DIRECTORY\n", argv[0]);
    return 2;
  }
  try {
    const rankwise::AdapterFile adapter = rankwise::read_adapter(argv[1]);
    for (const auto& [name, A] : adapter.tensors) {
      auto key = rankwise::parse_adapter_key(name);
      if (!key || key->part != rankwise::AdapterKey::Part::lora_A) continue;
      key->part = rankwise::AdapterKey::Part::lora_B;
      const auto& B = adapter.tensors.at(rankwise::to_string(*key));
      const auto base = torch::zeros({B.size(0), A.size(1)}, A.options());
      const double scaling = adapter.config.scaling(key->module);
      const auto update = std::get<0>(rankwise::merged_weight(base, A, B, {}, scaling));
      std::printf("%s: rank %ld, scaling %g, update norm %.6f\n", key->module.c_str(),
                  static_cast<long>(A.size(0)), scaling, update.norm().item<double>());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
