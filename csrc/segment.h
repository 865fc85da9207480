// Where a packed sequence lies, whatever its boundaries hold: on a device they cannot be checked without a synchronisation, and anywhere they may
// have changed since they were.
#pragma once
#include "common.h"

namespace fastalign {

// Sequence s of offsets [sequences + 1]. One that does not lie inside [0, tokens] comes out empty and not ok; what depends on it is then NaN.
struct Segment {
  int64_t begin, end;
  bool ok;

  FA_HD bool holds(int64_t token) const { return begin <= token && token < end; }
};
FA_HD Segment segment(const int32_t* offsets, int64_t sequences, int64_t tokens, int64_t s) {
  if (s < 0 || s >= sequences) return {0, 0, false};
  const int64_t begin = offsets[s], end = offsets[s + 1];
  return 0 <= begin && begin <= end && end <= tokens ? Segment{begin, end, true} : Segment{0, 0, false};
}

// The tokens that sequence s has to write: of good offsets its own, otherwise also those that would be left to nobody. Together the sequences'
// shares are all of [0, tokens).
struct Share { int64_t begin, end; };
FA_HD int64_t inside(int64_t token, int64_t tokens) { return token < 0 ? 0 : token > tokens ? tokens : token; }
FA_HD Share share(const int32_t* offsets, int64_t sequences, int64_t tokens, int64_t s) {
  return {s == 0 ? 0 : inside(offsets[s], tokens), s == sequences - 1 ? tokens : inside(offsets[s + 1], tokens)};
}

}  // namespace fastalign
