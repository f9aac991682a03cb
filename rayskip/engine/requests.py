"""What callers asked for and have not got yet: rows gain tokens until they end, requests until all their rows did.

Knows neither workers nor the queue.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rayskip.data.records import FinishReason, Generation, Prompt
from rayskip.decode.sampling import Choice
from rayskip.decode.sequence import Sequence
from rayskip.decode.stopping import Stopper
from rayskip.skip import SkipPolicy, full_depth


@dataclass(frozen=True)
class Completion:
    """All samples of one request, in sample order."""

    request_id: int
    generations: list[Generation]


@dataclass
class _Request:
    prompt: Prompt
    samples: dict[int, Generation] = field(default_factory=dict)


class Requests:
    """Those of one engine. next_id: of the next one."""

    def __init__(self, stopper: Stopper, policy: SkipPolicy, layers: int, max_model_len: int) -> None:
        """layers: of the model."""
        self.next_id = 0
        self._stopper, self._policy, self._max_model_len = stopper, policy, max_model_len
        self._full_depth = full_depth(layers)
        self._left: dict[int, _Request] = {}

    def __len__(self) -> int:
        return len(self._left)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._left

    def add(self, prompt: Prompt) -> int:
        """Returns its id."""
        request_id, self.next_id = self.next_id, self.next_id + 1
        self._left[request_id] = _Request(prompt)
        return request_id

    def give_up(self, request_ids: Collection[int]) -> None:
        """They will not complete; their rows end at their next token."""
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def advance(self, row: Sequence, choices: Seq[Choice]) -> int:
        """Append the chosen tokens to a row, up to one that ends it; how many it got."""
        later = max(row.forget_pending() - 1, 0)
        if row.request_id not in self:
            row.ended = True
            return 0
        if row.matcher is not None and (error := row.matcher.error):
            self._finish(row, "error", ("constraint_failed", error))
            return 0
        if row.prompt.candidates and choices[0].token_id is not None:
            self._finish(row, "score", scores=choices[0].scores)
            return 0
        for count, choice in enumerate(choices):
            if choice.token_id is None:
                self._finish(row, "error", ("non_finite_logits", "the model's logits are not finite"))
                return count
            row.generated.append(choice.token_id)
            if choice.logprob is not None:
                row.logprobs.append(choice.logprob)
            reason = self._stopper.reason(row.generated, row.params, self._max_model_len - row.length)
            if reason is not None:
                self._finish(row, reason)
                return count + 1
        row.computed += len(choices) - 1
        row.expect(later)
        return len(choices)

    def complete(self, ended: Iterable[Sequence]) -> list[Completion]:
        """Completions of the requests whose last sample is among the rows that ended; none of one given up."""
        found = []
        for request_id in dict.fromkeys(row.request_id for row in ended):
            request = self._left.get(request_id)
            if request is not None and len(request.samples) == request.prompt.samples:
                del self._left[request_id]
                samples = [request.samples[sample] for sample in sorted(request.samples)]
                found.append(Completion(request_id, samples))
        return found

    def _finish(
        self,
        row: Sequence,
        reason: FinishReason,
        error: tuple[str | None, str | None] = (None, None),
        scores: list[float] | None = None,
    ) -> None:
        row.ended = True
        policy = self._full_depth if row.full_depth else self._policy
        self._left[row.request_id].samples[row.sample] = Generation(
            row_index=row.prompt.row_index,
            sample_index=row.sample,
            finish_reason=reason,
            text=None if reason in ("error", "score") else self._stopper.text(row.generated, row.params),
            token_ids=row.generated,
            prompt_tokens=len(row.prompt.token_ids),
            completion_tokens=len(row.generated),
            logprobs=row.logprobs if row.params.logprobs is not None else None,
            skip_policy=policy.name,
            mean_layers=policy.mean_depth(len(row.generated)),
            error_type=error[0],
            error_message=error[1],
            scores=scores,
        )
