"""Dynamic contrastive distillation (Zhou et al., AAAI 2025, arXiv 2412.08939)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparkir.distill.encoder import Codebook, Encoded, Encoder, encode, encoder_of, fit_codebook
from sparkir.distill.features import observe
from sparkir.distill.method import Method, Seen, Setting, Term
from sparkir.errors import SparkirError
from sparkir.models.modes import device_of
from sparkir.quant.arithmetic import exact_rounding
from sparkir.quant.prepare import carry_facts

_LEVEL_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
_EPSILON = 1e-7
_NEGATIVES = 4
"""Noisy inputs of the history student, besides the clean one."""
_NOISE_LEVELS = (1.0, 30.0)
_GREY_NOISE = 0.5
_DISTRIBUTION_SHARE = 0.01
"""Of the distribution mapping, 0.001, relative to the contrast, 0.1."""
_HISTORY_DECAY = 0.1
_RENEW_EVERY, _STAGE = 1_000 / 250_000, 100_000 / 250_000
"""Steps between two renewals of the history, and until that gets longer, of all steps."""


class DCKD(Method):
    """Nearer to the teacher than to the student's own past, and of the teacher's codes.

    sum_i w_i mean |f_i(S) - f_i(T)| / mean sum_j |f_i(S) - f_i(N_j)|, with f an encoder's levels,
    T the teacher's output and N_j those of the history student, an average of the student's past,
    on the clean input and on four noisy ones; and the cross entropy of softmax(-distances to the
    encoder's codes) of S against T's. Published with 0.1 and 0.001, beside L1 to T, images in
    [0, 1].

    As in the released settings: Gaussian noise alone, no blur. Left out: its label-consistency
    loss, which is another paper's (DUKD). The history is renewed at the published shares of the
    training, from the student itself; the released code has a second average in between, and takes
    the softmax twice.
    """

    title = "DCKD"
    published_factor = 0.1

    def __init__(self, setting: Setting, *, factor: float | None = None, encoder: str = "") -> None:
        """Copy the student, and fit a codebook if the encoder has none.

        Raises:
            SparkirError: `encoder`, as in `encoder_of`, is none.
        """
        super().__init__(factor=factor)
        device = device_of(setting.student)
        chosen = encoder_of(encoder).to(device).eval().requires_grad_(False)
        # In lists, so that they are neither trained nor saved.
        self._encoder, self._student = [chosen], [setting.student]
        self.history = copy.deepcopy(setting.student).eval().requires_grad_(False)
        carry_facts(setting.student, self.history)
        self.codebook = _codebook(chosen, setting, device)
        self._steps, self._seen = setting.steps, 0

    def train(self, mode: bool = True) -> DCKD:
        """The history student stays in evaluation mode."""
        super().train(mode)
        self.history.eval()
        return self

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """A contrast for each level, and the distribution of codes.

        The contrast's map is the distance of S and T at a location over the mean distance of S and
        N, which is one number: W weights the nearness, not what is kept away from.
        """
        if self.training:
            self._renew_history()
        encoded = self._encode(seen.output)
        with torch.no_grad():
            goal = self._encode(seen.teacher_output)
            past = [self._encode(image) for image in self._negatives(seen.lq)]
        return (*self._contrast(encoded, goal, past), self._distribution(encoded, goal))

    def _encode(self, images: Tensor) -> Encoded:
        return encode(self._encoder[0], images)

    def _contrast(self, own: Encoded, goal: Encoded, past: list[Encoded]) -> list[Term]:
        terms = []
        for level, weight in enumerate(_LEVEL_WEIGHTS):
            anchor = own.levels[level]
            away = sum((anchor - negative.levels[level]).abs() for negative in past)
            assert isinstance(away, Tensor)
            distance = (anchor - goal.levels[level]).abs() / (away.mean() + _EPSILON)
            terms.append(Term(name="contrast", distance=distance, factor=self.factor * weight))
        return terms

    def _distribution(self, own: Encoded, goal: Encoded) -> Term:
        entropy = -self.codebook(goal.latents).exp() * self.codebook(own.latents)
        return Term(
            name="distribution",
            distance=entropy.sum(1, keepdim=True),
            factor=self.factor * _DISTRIBUTION_SHARE,
        )

    @torch.no_grad()
    def _negatives(self, lq: Tensor) -> list[Tensor]:
        """What the history student makes of the clean input, and of four noisy ones."""
        inputs = [lq, *(_noisy(lq) for _ in range(_NEGATIVES))]
        with exact_rounding(False):
            return [observe(self.history, (), image)[0] for image in inputs]

    def _renew_history(self) -> None:
        """Follow the student, once every so many steps; later ones are further apart."""
        if self._seen and self._seen % _renewal_at(self._seen, self._steps) == 0:
            follow(self.history, self._student[0], decay=_HISTORY_DECAY)
        self._seen += 1

    def begin_rounding(self) -> None:
        """The history starts again, as the student is now."""
        self.history.load_state_dict(self._student[0].state_dict())

    def describe(self) -> str:
        """Which encoder was used, which the result depends on."""
        encoder, codes = self._encoder[0], len(self.codebook.codes)
        made = "fitted to the teacher's outputs" if encoder.codebook is None else "its own"
        return f"DCKD looks at images with {encoder.name}; codebook of {codes}, {made}"

    def get_extra_state(self) -> dict[str, Any]:
        """How many steps the history has seen."""
        return {"seen": self._seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on counting there."""
        self._seen = state["seen"]


def _renewal_at(step: int, steps: int) -> int:
    """Steps between two renewals at `step` of `steps`: published as 1000, 2000, 3000 of 250,000."""
    stage = min(3, 1 + int((step - 1) / (_STAGE * steps)))
    return max(1, round(_RENEW_EVERY * steps)) * stage


@torch.no_grad()
def follow(history: nn.Module, student: nn.Module, *, decay: float) -> None:
    """history = decay * history + (1 - decay) * student; buffers are copied."""
    for old, new in zip(history.parameters(), student.parameters(), strict=True):
        old.mul_(decay).add_(new, alpha=1 - decay)
    current = dict(student.named_buffers())  # with more than it had when it was copied, perhaps
    for name, copied in history.named_buffers():
        copied.copy_(current[name])


def _noisy(lq: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Gaussian noise of 1 to 30 levels, drawn per image, alike in all channels for half of them."""
    each = (lq.shape[0], 1, 1, 1)
    low, high = _NOISE_LEVELS
    sigma = low + (high - low) * torch.rand(each, device=lq.device)
    grey = torch.rand(each, device=lq.device) < _GREY_NOISE
    noise = torch.where(grey, torch.randn_like(lq[:, :1]), torch.randn_like(lq))
    return (lq + sigma / 255 * noise).clamp(0, 1)


@torch.no_grad()
def _codebook(encoder: Encoder, setting: Setting, device: torch.device) -> Codebook:
    examples = setting.examples[0].to(device)
    encoded = encode(encoder, observe(setting.teacher, (), examples)[0])
    if len(encoded.levels) != len(_LEVEL_WEIGHTS):
        raise SparkirError(
            f"dckd compares {len(_LEVEL_WEIGHTS)} levels of features, and {encoder.name} gives "
            f"{len(encoded.levels)}; give it an encoder of that many"
        )
    if encoder.codebook is None:
        return fit_codebook(encoded.latents)
    if encoder.codebook.shape[1:] != encoded.latents.shape[1:2]:
        raise SparkirError(
            f"the codes of {encoder.name} are {tuple(encoder.codebook.shape)}, and its latents "
            f"have {encoded.latents.shape[1]} channels; a codebook is (codes, channels)"
        )
    return Codebook(encoder.codebook.to(device), torch.ones((), device=device))
