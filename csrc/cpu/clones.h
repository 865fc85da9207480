// One body, compiled for several instruction sets and chosen by the loader. -ffp-contract=off keeps the arithmetic of all of them equal.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FA_CLONES
#endif
// What a cloned function calls must become part of it.
#define FA_BODY inline __attribute__((always_inline))
