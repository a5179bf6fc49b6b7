"""Suite `workloads`: GRUs that people train and run, in the shapes of their public configuration files.

Each is run the nearest way that nn.GRU's users have today, and its row says where that differs from the source. A rate
is what a stranger understands of it: so many of `unit` a second, `count` of them in a call.
"""

from dataclasses import dataclass

from .cases import Case, Entry

TRAINS, STEPS = ("forward+backward",), ("streaming",)

NO_RESETS = "resets at episode ends left out"


@dataclass(frozen=True)
class Workload:
    """A shape with its source. differs: from how its users run it."""

    name: str
    source: str
    case: Case
    passes: tuple[str, ...]
    unit: str
    count: int
    differs: str = ""

    @property
    def entry(self) -> Entry:
        note = f"{self.name}, {self.source}" + (f", {self.differs}" if self.differs else "")
        return Entry(self.case, self.passes, note=note)

    def rate(self, us: float) -> str:
        """What a call of so many microseconds is worth."""
        return f"{self.count / us * 1e6:,.0f} {self.unit} a second"


def _of(name: str, source: str, case: Case, unit: str, each: int = 1, differs: str = "") -> Workload:
    """One that trains: of every row and timestep `each` of its unit."""
    return Workload(name, source, case, TRAINS, unit, each * (sum(case.lengths) or case.B * case.T), differs)


WORKLOADS = (
    _of(
        "Dreamer's world model",
        "github.com/danijar/dreamerv3, dreamerv3/configs.yaml: batch_length 64, batch_size 16, deter 8192 in 8 blocks",
        Case(64, 16, 1024, 1024, "bf16", blocks=8), "environment steps learned from",
        differs="each block a GRU of its own, one after another; no normalisation inside",
    ),
    _of(
        "brain-to-text",
        "github.com/Neuroprosthetics-Lab/nejm-brain-to-text, model_training/rnn_args.yaml: n_layers 5, n_units 768, "
        "batch_size 64, patches of 14 x 512 features",
        Case(256, 64, 7168, 768, "bf16", layers=5), "patches of neural data (80 ms)",
        differs="T is the data's, 256 is an assumption; parameters in bf16 instead of autocast; no dropout",
    ),
    _of(
        "RNNoise", "github.com/xiph/rnnoise, torch/rnnoise/train_rnnoise.py: gru-size 256, batch-size 192, "
        "sequence-length 2000, three GRUs",
        Case(2000, 192, 256, 256, layers=3), "frames of speech (10 ms)",
    ),
    _of(
        "PPO-RNN on Craftax", "github.com/MichaelTMatthews/Craftax_Baselines, ppo_rnn.py: num_envs 1024 in "
        "num_minibatches 8, num_steps 64, layer_size 512",
        Case(64, 128, 512, 512), "environment steps learned from", differs=NO_RESETS,
    ),
    _of(
        "IPPO on SMAX", "github.com/FLAIROx/JaxMARL, baselines/IPPO/config/ippo_rnn_smax.yaml: NUM_ENVS 128 with the 5 "
        "agents of 2s3z in NUM_MINIBATCHES 4, NUM_STEPS 128, GRU_HIDDEN_DIM 128",
        Case(128, 160, 128, 128), "agent steps learned from", differs=NO_RESETS,
    ),
    _of(
        "GRU4Rec", "github.com/hidasib/GRU4Rec_PyTorch_Official, paramfiles/rees46_xe_shared_best.py: layers 512, "
        "batch_size 240, one step at a time",
        Case(1, 240, 512, 512), "clicks learned from",
    ),
    _of(
        "LFADS, encoder of the initial condition", "github.com/arsedler9/lfads-torch, configs/model/nlb_mc_maze.yaml "
        "and configs/datamodule: encod_seq_len 140, ic_enc_dim 100, batch_size 256",
        Case(140, 256, 137, 100, bidirectional=True), "bins of neural data (5 ms)",
    ),
    _of(
        "LFADS, encoder of the controller", "github.com/arsedler9/lfads-torch, configs/model/nlb_mc_maze.yaml: "
        "encod_seq_len 140, ci_enc_dim 80, batch_size 256",
        Case(140, 256, 137, 80, bidirectional=True), "bins of neural data (5 ms)",
    ),
    _of(
        "LFADS, generator", "github.com/arsedler9/lfads-torch, configs/model/nlb_mc_maze.yaml: gen_dim 100, a cell "
        "that takes 180 steps, each with what the controller makes of the one before",
        Case(1, 256, 4, 100, cell=True), "bins of neural data (5 ms)", differs="one of its steps",
    ),
    _of(
        "TorchRL's benchmark of resets", "github.com/pytorch/rl, benchmarks/bench_gru_reset_backends.py, in sizes "
        "between those it sweeps (batches 128 to 2048, lengths 16 to 256)",
        Case(128, 256, 64, 512, resets=0.02), "frames learned from",
        differs="an episode is 50 steps on average: an assumption; the source times inference alone",
    ),
    _of(
        "a padded batch of utterances", "log-normal lengths, mixed, beside packing and unpacking; of no configuration "
        "file", Case(400, 64, 80, 512, "bf16", layers=2, bidirectional=True, padded=True), "frames of speech (10 ms)",
    ),
    *(
        Workload(
            f"a recurrent policy, H {H}", "a policy that acts in one environment, a step at a time",
            Case(1, 1, H, H), STEPS, "actions", 1,
        )
        for H in (64, 256)
    ),
)  # fmt: skip
BY_CASE = {workload.case.name: workload for workload in WORKLOADS}  # rows are told apart by their shape
