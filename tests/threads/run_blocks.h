// How many threads run_blocks starts.
#pragma once

namespace rankwise {

extern int block_threads;

}  // namespace rankwise
