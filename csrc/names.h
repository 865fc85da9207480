// The columns of tables and the codes of options by the names of their enums, as a list: the tests hold Python's and Triton's numbers against it.
// They also see to it that no enumerator is missing here.
#pragma once
#include <utility>
#include "math/list.h"
#include "math/pair.h"
#include "math/policy.h"
#include "math/row_state.h"
#include "ops.h"

namespace fastalign {

#define FA_NUMBER(name) {#name, int(name)},
#define FA_POLICY_NUMBER(name) FA_NUMBER(kPolicy_##name)
#define FA_OUTPUT_NUMBER(bit, name) FA_NUMBER(bit)
#define FA_VALUE_NUMBER(name) FA_NUMBER(kValue_##name)
// clang-format off: a line per enum
constexpr std::pair<const char*, int> kNumbers[] = {
  // pair.h
  FA_TRANSFORMS(FA_NUMBER) FA_NUMBER(kNoLink) FA_LINKS(FA_NUMBER)
  FA_NUMBER(kHard) FA_NUMBER(kSmooth) FA_NUMBER(kRobust) FA_NUMBER(kSoft)
  FA_NUMBER(kTokenMeanGlobal) FA_NUMBER(kSeqMean) FA_NUMBER(kSeqSum)
  FA_NUMBER(kMean) FA_NUMBER(kSum) FA_NUMBER(kNone)
  FA_NUMBER(kSumPolicy) FA_NUMBER(kSumRatio) FA_NUMBER(kSumLength) FA_NUMBER(kSumKl) FA_NUMBER(kSumSft) FA_NUMBER(kSumSftLength) FA_NUMBER(kSumWidth)
  FA_NUMBER(kTabChosen) FA_NUMBER(kTabRejected) FA_NUMBER(kTabKlChosen) FA_NUMBER(kTabKlRejected) FA_NUMBER(kTabSft)
  FA_NUMBER(kTabRewardChosen) FA_NUMBER(kTabRewardRejected) FA_NUMBER(kTabLogit) FA_NUMBER(kTabValid) FA_NUMBER(kTabPair) FA_NUMBER(kTabNll)
  FA_NUMBER(kTableWidth)
  // list.h
  FA_NUMBER(kPairwise) FA_NUMBER(kPlackettLuce) FA_NUMBER(kPro) FA_NUMBER(kInfonca) FA_NUMBER(kNca) FA_NUMBER(kExoList)
  FA_NUMBER(kGainOne) FA_NUMBER(kGainLambda)
  FA_NUMBER(kListTerm) FA_NUMBER(kListNll) FA_NUMBER(kListValid) FA_NUMBER(kListPairs) FA_NUMBER(kListCorrect) FA_NUMBER(kListMargin)
  FA_NUMBER(kListTop) FA_NUMBER(kListBest) FA_NUMBER(kListWorst) FA_NUMBER(kListTableWidth)
  FA_NUMBER(kMaxList)
  // policy.h, scalar.h
  FA_NUMBER(kClip) FA_NUMBER(kReinforce) FA_NUMBER(kCispo) FA_NUMBER(kSapo) FA_NUMBER(kGmpo) FA_NUMBER(kVespo)
  FA_NUMBER(kRatioToken) FA_NUMBER(kRatioSeqMean) FA_NUMBER(kRatioSeqMeanToken) FA_NUMBER(kRatioSeqSum)
  FA_NUMBER(kTokenMean) FA_NUMBER(kSeqMeanTokenMean) FA_NUMBER(kSeqMeanTokenSum) FA_NUMBER(kSeqMeanTokenSumNorm) FA_NUMBER(kTokenSum)
  FA_NUMBER(kIsAsGiven) FA_NUMBER(kIsTruncate) FA_NUMBER(kIsMask)
  FA_NUMBER(kK1) FA_NUMBER(kK2) FA_NUMBER(kK3) FA_NUMBER(kAbs) FA_NUMBER(kK3Plus)
  FA_POLICY_STATS(FA_POLICY_NUMBER) FA_VALUE_STATS(FA_VALUE_NUMBER) FA_NUMBER(kPolicyStats) FA_NUMBER(kValueStats)
  FA_NUMBER(kPolicyTile) FA_NUMBER(kGaeTile)
  // row_state.h
  FA_NUMBER(kColM) FA_NUMBER(kColS0) FA_NUMBER(kColS1) FA_NUMBER(kColS2) FA_NUMBER(kColSz) FA_NUMBER(kColUmax) FA_NUMBER(kColTop) FA_NUMBER(kColLargest)
  FA_NUMBER(kColValid) FA_NUMBER(kColRefM) FA_NUMBER(kColRefS0) FA_NUMBER(kColT) FA_NUMBER(kColTr) FA_NUMBER(kColRefUmax) FA_NUMBER(kStateWidth)
  FA_ROW_RESULTS(FA_OUTPUT_NUMBER)
};
// clang-format on
#undef FA_NUMBER
#undef FA_POLICY_NUMBER
#undef FA_VALUE_NUMBER
#undef FA_OUTPUT_NUMBER

}  // namespace fastalign
