// What a fuzz target promises beyond not crashing.
#pragma once

#include <cstdio>
#include <cstdlib>

/// Ends the process, which the fuzzer reports, when a promise is broken.
inline void check(bool kept, const char* promise) {
  if (kept) return;
  std::fprintf(stderr, "broken: %s\n", promise);
  std::abort();
}
