// One binary for all x86 processors: the loader picks the widest form the machine has. Not under
// sanitizers, whose code in what picks would run before they are ready.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define RANKWISE_X86_DISPATCH 1
#define RANKWISE_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define RANKWISE_TARGET(name) __attribute__((target(name)))
#else
#define RANKWISE_X86_DISPATCH 0
#define RANKWISE_VECTOR_CLONES
#endif
