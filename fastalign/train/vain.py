"""A run that learns nothing says so: at the first step that taught nothing, with the reason as far as the
step's own numbers show it, and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

# A step's metrics -> whether nothing could be learnt from it; the first that applies is the reason.
_REASONS: tuple[tuple[Callable[[Mapping[str, float]], bool], str], ...] = (
    (lambda m: "num_unscored" in m and "objective/scores" not in m, "no response could be scored"),
    (  # that of Nash-MD is against somebody else, XPO's other response is not among these
        lambda m: m.get("objective/scores_std") == 0.0 and "objective/win_rate" not in m,
        "all responses have the same reward, so none is better than another",
    ),
    (
        lambda m: m.get("num_pairs") == 0,
        "no prompt has two responses of different reward, so there is no pair",
    ),
    (lambda m: m.get("frac_zero_std") == 1.0, "in every group all responses have the same reward"),
    (
        lambda m: m.get("grad_norm") == 0.0,
        "the gradient is exactly 0 (a beta or weight of 0, or examples in which nothing is better than "
        "anything?)",
    ),
)


class Vain:
    """Counts the steps that teach nothing. `say` prints a line."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.count, self.steps = say, 0, 0

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps += 1
        reason = next((text for applies, text in _REASONS if applies(metrics)), None)
        if reason is None:
            return
        self.count += 1
        if self.count == 1:
            self.say(f"note: step {step} teaches nothing: {reason}")

    def conclude(self) -> None:
        if self.count > 1:
            all_of_them = "nothing was learnt: " if self.count == self.steps else ""
            self.say(f"note: {all_of_them}{self.count} of {self.steps} steps taught nothing")


def note_examples(useless: Iterable[bool], noun: str, why: str) -> None:
    """Print how many examples teach nothing, if any do; before training."""
    flags = list(useless)
    if any(flags):
        print(f"note: {sum(flags)} of {len(flags)} {noun}s teach nothing: {why}")
