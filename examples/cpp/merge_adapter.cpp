// A model's adapter: reads a PEFT folder, of LoRA or AdaLoRA, and prints, for each adapted module,
// the size of its update.
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
    for (const auto& [module, A, B, E, scaling, embedding] : rankwise::updates_of(adapter)) {
      const auto base = torch::zeros({B.size(0), A.size(1)}, A.options());
      const auto update = std::get<0>(rankwise::merged_weight(base, A, B, E, scaling));
      std::printf("%s: rank %ld, scaling %g, update norm %.6f\n", module.c_str(),
                  static_cast<long>(A.size(0)), scaling, update.norm().item<double>());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
