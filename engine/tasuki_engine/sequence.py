"""One request while the engine works on it."""

import enum
from array import array

from tasuki_common.hashing import HashAlgorithm, block_hashes
from tasuki_engine.block_pool import NULL
from tasuki_engine.request import EngineRequest, TokenLogprobs
from tasuki_engine.sampler import SamplerRow


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PINNED = enum.auto()
    """A hand-over that is computed and kept until released."""
    DONE = enum.auto()


class Sequence:
    """Tokens, progress and units of one request.

    `tokens` are prompt and output as far as the host knows them; tokens in flight come after.
    `num_computed` tokens are in the caches when all launched steps have ended, `num_settled` when
    all collected ones have; the sequence runs until the first reaches `target`. `names` are the
    names of the full blocks of `tokens`, empty for a sequence that neither reads nor writes the
    prefix cache.
    """

    __slots__ = (
        "arrival",
        "block_size",
        "deadline",
        "first_window_block",
        "full",
        "hash_algorithm",
        "id",
        "junction",
        "max_tokens",
        "names",
        "num_cached",
        "num_computed",
        "num_offered",
        "num_published",
        "num_settled",
        "num_shared",
        "num_tabled",
        "num_tabled_window",
        "output",
        "parent",
        "prompt_end",
        "prompt_logprobs",
        "prompt_logprobs_sent",
        "request",
        "row",
        "sampler_row",
        "slot",
        "state",
        "tokens",
        "window",
        "writes_cache",
    )

    def __init__(
        self,
        request: EngineRequest,
        tokens: "array[int]",
        *,
        arrival: int,
        deadline: float | None,
        block_size: int,
        hash_algorithm: HashAlgorithm,
        parent: bytes | None,
        writes_cache: bool,
        max_tokens: int,
        sampler_row: SamplerRow,
    ) -> None:
        """tokens: those of the request, typecode "i". parent: the root of its block names, None to
        name none."""
        self.request = request
        self.id = request.request_id
        self.arrival = arrival
        self.deadline = deadline
        self.block_size = block_size
        self.hash_algorithm: HashAlgorithm = hash_algorithm
        self.writes_cache = writes_cache
        self.max_tokens = max_tokens
        self.sampler_row = sampler_row
        self.state = State.WAITING
        self.output = sampler_row.output_token_ids
        self.tokens = tokens
        self.parent = parent
        self.names: list[bytes] = []
        if parent is not None:
            self.names = block_hashes(hash_algorithm, parent, self.tokens, block_size)
        self.num_cached: int | None = None
        """Tokens that the first admission found here."""
        self.num_offered = 0
        """Blocks of a hand-over that were reported."""
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.prompt_logprobs_sent = request.sampling.prompt_logprobs is None
        self.forget_progress()

    def forget_progress(self) -> None:
        """Back to nothing computed and nothing held; the units are the caller's business."""
        self.row = -1
        self.num_computed = self.num_settled = 0
        self.num_published = 0
        self.num_shared = 0
        """Tokens whose full-attention blocks are others' too and must not be written."""
        self.num_tabled = self.num_tabled_window = 0
        """Blocks that the device's tables know."""
        self.full: list[int] = []
        self.window: list[int] = []
        """By block number; the null block where it fell behind the window."""
        self.first_window_block = 0
        self.slot = NULL
        self.prompt_end = self.junction = 0
        """Boundaries, in tokens, where a checkpoint outlives regular ones; 0: none."""
        if not self.prompt_logprobs_sent:
            self.prompt_logprobs = [None]

    @property
    def resumable_blocks(self) -> int:
        """Blocks that may come from elsewhere: at least one token is left to compute."""
        return (len(self.tokens) - 1) // self.block_size

    @property
    def reads_cache(self) -> bool:
        """Whether it may start from what others computed."""
        return self.writes_cache or self.request.prefix_id is not None

    @property
    def target(self) -> int:
        """Tokens to compute before a token is drawn.

        For a hand-over, and for a prompt that is only scored, it is dropped: where there is none,
        what was computed is wrong.
        """
        if self.request.hand_over:
            return self.resumable_blocks * self.block_size
        return len(self.tokens) + self.sampler_row.in_flight

    @property
    def num_missing(self) -> int:
        """Tokens still to compute; none when its last token is in flight."""
        row = self.sampler_row
        if row.in_flight and row.num_output >= self.max_tokens:
            return 0
        return self.target - self.num_computed

    @property
    def awaits_history(self) -> bool:
        """Whether its next token depends on a token in flight that the host must count."""
        return self.sampler_row.in_flight > 0 and self.sampler_row.penalised

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first; the last is preempted first."""
        return self.request.priority, self.arrival

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logits of prompt positions are still needed."""
        return not self.prompt_logprobs_sent

    def append(self, token: int) -> None:
        """Adds an output token, and the name of the block that it fills."""
        self.tokens.append(token)
        self.output.append(token)
        if self.parent is not None and len(self.tokens) % self.block_size == 0:
            parent = self.names[-1] if self.names else self.parent
            block = self.tokens[-self.block_size :]
            self.names += block_hashes(self.hash_algorithm, parent, block, self.block_size)
