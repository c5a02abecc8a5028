// Two adapters of one model: reads their PEFT folders, of LoRA or AdaLoRA, prints what each matrix
// of them is and how far they lie apart, and writes their combination, exact or of a lower rank.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace analysis = rankwise::analysis;

void inspect(const std::string& folder, const rankwise::AdapterFile& adapter) {
  std::printf("%s\n", folder.c_str());
  for (const rankwise::AdapterUpdate& update : rankwise::updates_of(adapter)) {
    const analysis::DeltaSpectrum spectrum = analysis::delta_spectrum(update);
    const analysis::EffectiveRanks ranks = analysis::effective_ranks(spectrum.S);
    std::printf("  %s: rank %ld, norm %.4f, stable rank %.2f, 99 %% of the energy in %ld\n",
                update.module.c_str(), static_cast<long>(update.lora_A.size(0)),
                spectrum.S.norm().item<double>(), ranks.stable, static_cast<long>(ranks.energy_99));
  }
}

void compare(const rankwise::AdapterFile& first, const rankwise::AdapterFile& second) {
  std::printf("relative distances\n");
  for (const auto& [module, distance] : analysis::distances(first, second))
    std::printf("  %s: %.4f\n", module.c_str(), distance.relative);
}

double number(const char* text) {
  char* end = nullptr;
  const double value = std::strtod(text, &end);
  if (end == text || *end != '\0')
    throw std::invalid_argument(std::string("weights and ranks are numbers, got ") + text);
  return value;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6 && argc != 7) {
    std::fprintf(stderr, "usage: %s FOLDER WEIGHT FOLDER WEIGHT OUTPUT [RANK]\n", argv[0]);
    return 2;
  }
  try {
    const std::vector<rankwise::AdapterFile> adapters = {rankwise::read_adapter(argv[1]),
                                                         rankwise::read_adapter(argv[3])};
    inspect(argv[1], adapters[0]);
    inspect(argv[3], adapters[1]);
    compare(adapters[0], adapters[1]);
    analysis::CombineOptions options;
    if (argc == 7) options.rank = static_cast<int64_t>(number(argv[6]));
    const std::vector<double> weights = {number(argv[2]), number(argv[4])};
    const rankwise::AdapterFile combined = analysis::combine(adapters, weights, options);
    rankwise::write_adapter(argv[5], combined);
    inspect(argv[5], combined);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
