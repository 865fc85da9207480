"""`kernels benchmark`: log-probs, entropy and a DPO loss against plain PyTorch."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

ROWS, VOCAB = 4096, 128256
PAIRS, LENGTH = 64, 1024


class TokenLogprobs(Benchmark):
    seed = 0

    def setup(self):
        self.logits = torch.randn(ROWS, VOCAB, device=self.device, dtype=torch.bfloat16)
        self.labels = torch.randint(VOCAB, (ROWS,), device=self.device)
        self.out = torch.empty(ROWS, device=self.device)

    def benchmark_logprobs(self):
        self.out = self.kernel.token_logprobs(self.logits, self.labels)

    def verify_logprobs(self) -> torch.Tensor:
        return F.log_softmax(self.logits.float(), -1).gather(1, self.labels[:, None])[:, 0]

    def benchmark_entropy(self):
        self.out = self.kernel.entropy_from_logits(self.logits)

    def verify_entropy(self) -> torch.Tensor:
        log_p = F.log_softmax(self.logits.float(), -1)
        return -(log_p.exp() * log_p).sum(-1)


class PreferenceLoss(Benchmark):
    seed = 0

    def setup(self):
        tokens = 2 * PAIRS * LENGTH
        self.logprobs = -4.0 * torch.rand(tokens, device=self.device)
        self.reference = self.logprobs + 0.1 * torch.randn_like(self.logprobs)
        self.cu_seqlens = torch.arange(0, tokens + 1, LENGTH, device=self.device, dtype=torch.int32)
        self.out = torch.empty((), device=self.device)

    def benchmark_dpo(self):
        self.out = self.kernel.preference_loss(
            self.logprobs, self.reference, self.cu_seqlens, loss="dpo", beta=0.1
        ).loss

    def verify_dpo(self) -> torch.Tensor:
        sums = (self.logprobs - self.reference).view(-1, 2, LENGTH).sum(-1)
        return -F.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])).mean()
