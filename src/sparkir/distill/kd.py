"""Plain distillation: the teacher's output and nothing else (Hinton 2015, for images)."""

from __future__ import annotations

from sparkir.distill.method import Method, Seen, Term


class KD(Method):
    """No term of its own: `norm`, `strength` and `target` of the task say it all."""

    title = "KD"

    def forward(self, seen: Seen) -> tuple[Term, ...]:
        """Nothing besides the outputs."""
        return ()
