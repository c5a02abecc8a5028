// Two adapters of one model, trained from two seeds: prints what each matrix of them is, on how
// many directions they agree, and the ranks that either speaks for within a budget of parameters.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <charconv>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace {

namespace analysis = rankwise::analysis;

void print(const char* title, const analysis::RankEvidence& evidence, int64_t budget) {
  const analysis::RankAdvice advice = analysis::rank_advice(evidence, {.budget = budget});
  std::printf("%s\n", title);
  for (size_t i = 0; i < advice.ranks.size(); ++i) {
    const auto& [module, out, in, scores] = evidence.matrices[i];
    double score = 0;
    for (const double own : scores) score += own;
    std::printf("  %s: %ld x %ld, score %.4g, rank %ld\n", module.c_str(), static_cast<long>(out),
                static_cast<long>(in), score, static_cast<long>(advice.ranks[i].second));
  }
  std::printf("  %ld of %ld parameters\n", static_cast<long>(advice.spent),
              static_cast<long>(advice.budget));
}

int64_t integer(const char* text) {
  int64_t value = 0;
  const char* const end = text + std::strlen(text);
  if (const auto read = std::from_chars(text, end, value);
      read.ec != std::errc() || read.ptr != end)
    throw std::invalid_argument(std::string("the budget is a whole number, got ") + text);
  return value;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s FOLDER FOLDER BUDGET\n", argv[0]);
    return 2;
  }
  try {
    const int64_t budget = integer(argv[3]);
    const auto first = rankwise::read_adapter(argv[1]), second = rankwise::read_adapter(argv[2]);
    print("by the energy of the first one's directions", analysis::update_energies(first), budget);
    print("by the directions of both inputs that agree", analysis::seed_agreement(first, second),
          budget);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
