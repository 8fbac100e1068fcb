import math
from dataclasses import asdict, fields

import pytest
import yaml

import esft
import esft_kernels
from esft.evaluation.text_scores import TEXT_SCORES
from esft.experts.pooled_experts import FROZEN as POOLS_FROZEN
from esft.optimizer.moments import MOMENTS
from esft.runs.config import BACKENDS, FROZEN, FROZEN_LINEAR, METHODS, OPTIMIZERS, RECOMPUTES, SCORES, TrainConfig
from esft.selection import ExpertSelection
from esft.storage.files import write_yaml
from esft.swapping.packed_modules import FROZEN_LINEAR as MODULES_FROZEN


def test_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.steps, config.batch_size, config.eval_every) == (500, 32, 100)
    assert (config.beta1, config.beta2, config.weight_decay, config.clip) == (0.9, 0.95, 0.1, 1.0)
    assert (config.method, config.lora_rank, config.lora_alpha) == ("esft", 8, 16)
    rates = {method: TrainConfig(method=method).learning_rate for method in METHODS}
    assert rates == {"esft": 1e-5, "full": 3e-5, "lora": 1e-4}


def test_what_the_paper_does_not_name_is_off_or_automatic():
    config = TrainConfig()
    assert (config.lr, config.micro_batch_size, config.warmup_steps, config.decay) == (None, None, 0, 0.0)
    assert config.max_length is None
    assert (config.assistant_only_loss, config.completion_only_loss, config.dataset_num_proc) == (True, True, None)
    assert (config.packing, config.packing_strategy, config.padding_free) == (False, "bfd", False)
    assert (config.eval_packing, config.streaming) == (None, False)
    assert (config.aux_loss, config.dtype, config.backend, config.recompute) == (0.0, "auto", "auto", "none")
    assert (config.save_every, config.seed, config.optimizer) == (100, 0, "adamw")


def test_arguments_override_the_file_and_yaml_floats_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nsteps: 7\nbatch_size: 5\n")
    config = TrainConfig.load(tmp_path / "c.yaml", steps=9, batch_size=None, seed=None)
    assert config == TrainConfig(lr=1e-3, steps=9, batch_size=5)
    assert (type(config.lr), type(config.steps)) == (float, int)


def test_without_a_file_and_from_an_empty_one_come_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert TrainConfig.load(tmp_path / "c.yaml") == TrainConfig.load(None) == TrainConfig()
    assert TrainConfig.load(None, method="full", decay=0.5) == TrainConfig(method="full", decay=0.5)


# Every setting otherwise than by default.
OTHER = {
    "compile": True,
    "method": "full", "lr": 0.5, "steps": 2, "batch_size": 3, "micro_batch_size": 2, "max_length": 4, "warmup_steps": 5,
    "decay": 0.25, "eval_every": 6, "save_every": 7, "weight_decay": 0.75, "beta1": 0.5, "beta2": 0.625, "clip": 8.0,
    "aux_loss": 0.125, "kl_weight": 0.75, "lora_rank": 9, "lora_alpha": 10, "dtype": "bfloat16", "seed": 11,
    "backend": "reference", "recompute": "frozen", "frozen": "bf16", "shard": "frozen", "frozen_linear": "int8",
    "optimizer": "adamw_8bit",
    "assistant_only_loss": False, "completion_only_loss": False, "dataset_num_proc": 3, "packing": True,
    "packing_strategy": "wrapped", "padding_free": True, "eval_packing": False, "streaming": True,
    "warmup_ratio": 0.25, "lr_scheduler_type": "cosine", "eval_on_start": False, "eval_metrics": "exact_match,loss",
    "metric_for_best_model": "loss", "greater_is_better": False, "load_best_model_at_end": True,
    "early_stopping_patience": 4, "early_stopping_threshold": 0.5, "report_to": "none",
}  # fmt: skip
# What few bits go with, and what excludes another.
TOGETHER = {"method": "esft", "compile": False, "decay": 0.0, "warmup_ratio": 0.0}


def test_a_saved_config_loads_again_and_lists_every_setting(tmp_path):
    config = TrainConfig(**(OTHER | TOGETHER))
    write_yaml(tmp_path / "c.yaml", asdict(config))
    assert TrainConfig.load(tmp_path / "c.yaml") == config
    assert list(yaml.safe_load((tmp_path / "c.yaml").read_text())) == [f.name for f in fields(TrainConfig)]
    write_yaml(tmp_path / "c.yaml", asdict(TrainConfig()))  # with settings that are None
    assert TrainConfig.load(tmp_path / "c.yaml") == TrainConfig()


def test_whole_numbers_are_read_as_the_kind_of_their_setting(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 3.0\nclip: 2\nlr: null\nmicro_batch_size: 4.0\nmethod: full\n")
    config = TrainConfig.load(tmp_path / "c.yaml")
    assert config == TrainConfig(steps=3, clip=2.0, micro_batch_size=4, method="full")
    assert (type(config.steps), type(config.clip), type(config.micro_batch_size)) == (int, float, int)


@pytest.mark.parametrize(
    "allowed",
    [
        *({name: 1} for name in ("steps", "max_length", "eval_every", "save_every", "lora_rank", "lora_alpha")),
        {"batch_size": 1, "micro_batch_size": 1},
        {"batch_size": 8, "micro_batch_size": 8},
        {"decay": 0.0},
        {"decay": 1.0},
        {"beta1": 0.0, "beta2": 0.0},
        {"weight_decay": 0.0, "aux_loss": 0.0},
        {"warmup_steps": 0, "seed": 0},
        {"seed": 2**63 - 1},
        {"clip": math.inf},
        {"lr": 1e-30},
        {"lr": 10.0},
        {"lr": 2.0, "weight_decay": 0.5},
        {"method": "lora", "recompute": "layers"},
        {"aux_loss": 0.1, "recompute": "frozen"},
        {"aux_loss": 0.1, "method": "full"},
        *({"dtype": dtype} for dtype in ("auto", "bfloat16", "float32")),
        *({"backend": backend} for backend in ("auto", "reference", "cpu", "triton")),
        *({"optimizer": optimizer} for optimizer in ("adamw", "adamw_8bit")),
        {"early_stopping_patience": 1, "early_stopping_threshold": 0.0},
        {"warmup_ratio": 0.5, "lr_scheduler_type": "cosine"},
        {"decay": 0.5, "lr_scheduler_type": "constant"},
        {"eval_metrics": "chrf, loss"},
        *({"recompute": recompute} for recompute in ("none", "frozen", "layers")),
    ],
    ids=str,
)
def test_what_is_allowed_is_kept_as_given(allowed: dict):
    config = TrainConfig(**allowed)
    assert {name: getattr(config, name) for name in allowed} == allowed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# one\nstepz: 3", r"line 2: no setting 'stepz' \(is 'steps' meant\?\)$"),
        ("qq: 3", "line 1: no setting 'qq'; there are method, lr, steps, .*, recompute$"),
        ("lr: 1\nsteps: many", "line 2: steps must be int, got 'many'"),
        ("steps: 2.5", "line 1: steps must be int, got '2.5'"),
        ("steps: .inf", "line 1: steps must be int"),
        ("steps: null", "line 1: steps must be int, got None"),
        ("steps: 1:30", "line 1: steps must be int, got '1:30'"),
        ("steps: 0x10", "line 1: steps must be int, got '0x10'"),
        ("steps: 1_000", "line 1: steps must be int, got '1_000'"),
        ("steps: -3", r"line 1: steps must be in \[1, inf\), got -3"),
        ("steps: " + "9" * 5000, "line 1: steps must be int, got '99999"),
        ("steps: " + "9" * 30, r"line 1: steps must be below 2\*\*63, got 9999"),
        ("steps: [1]", "line 1: 'steps' must have a single plain value"),
        ("steps: {a: 1}", "line 1: 'steps' must have a single plain value"),
        ("steps: !!python/object/apply:os.system [true]", "line 1: 'steps' must have a single plain value"),
        ("steps: !!binary aGk=", "line 1: 'steps' must have a single plain value"),
        ("[steps]: 1", "line 1: a setting's name must be a word"),
        ("lr: 1\nsteps: 2\nlr: 2", "line 3: 'lr' is set twice, first in line 1"),
        ("lr: &a 1\nclip: *a", r"line 1: not YAML \(anchors are not supported\)"),
        ("clip: *a", r"line 1: not YAML \(anchors are not supported\)"),
        ("seed: true", "line 1: seed must be int, got 'true'"),
        ("micro_batch_size: 1.5", "line 1: micro_batch_size must be int"),
        ("lr: true", "line 1: lr must be float"),
        ("lr: .nan", "line 1: lr must be float"),
        ("clip: null", "line 1: clip must be float, got None"),
        ("method: false", "line 1: method must be one of esft, full, lora, got 'false'"),
        ("- 1", "not a mapping of settings"),
        ("lr: 1\na: [", "line 2: not YAML"),
        ("lr: 1\n---\nlr: 2", "line 2: not YAML"),
        ("lr: 1\n\x07", "not YAML"),
        ("[" * 20_000, "YAML that is nested too deeply"),
        ("#" * 70_000, "has 70,000 bytes; at most 65,536 are read"),
    ],
    ids=range(32),
)
def test_what_cannot_be_a_setting_is_named_with_its_file_and_line(tmp_path, text: str, message: str):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(esft.InputError, match=f"c.yaml: {message}"):
        TrainConfig.load(tmp_path / "c.yaml")


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False)])
def test_what_is_true_or_false_is_read_as_yaml_and_as_an_option_writes_it(tmp_path, text: str, value: bool):
    (tmp_path / "c.yaml").write_text(f"packing: {text}\neval_packing: {text}\n")
    expected = TrainConfig(packing=value, eval_packing=value)
    assert TrainConfig.load(tmp_path / "c.yaml") == TrainConfig.load(None, packing=text, eval_packing=value) == expected


def test_a_stream_needs_steps_that_are_said(tmp_path):
    with pytest.raises(esft.InputError, match="^--streaming needs steps: a stream may have no end$"):
        TrainConfig.load(None, streaming="true")
    (tmp_path / "c.yaml").write_text("streaming: true\n")
    with pytest.raises(esft.InputError, match="^streaming needs steps"):
        TrainConfig.load(tmp_path / "c.yaml")
    assert TrainConfig.load(tmp_path / "c.yaml", steps=500).streaming
    assert not TrainConfig.load(tmp_path / "c.yaml", streaming="false").streaming


def test_an_argument_is_named_as_the_flag_that_it_came_by():
    for arguments, message in (
        ({"steps": "x"}, "--steps must be int, got 'x'"),
        ({"batch_size": "0"}, r"--batch-size must be in \[1, inf\), got 0"),
        ({"lr": True}, "--lr must be float"),
        ({"stepz": 1}, r"no setting 'stepz' \(is 'steps' meant\?\)"),
        ({"micro_batch_size": "9", "batch_size": "8"}, "--micro-batch-size must be at most --batch-size 8, got 9"),
        ({"micro_batch_size": "99"}, "--micro-batch-size must be at most batch_size 32, got 99"),
        ({"lr": "1e-400"}, r"--lr must be float \| None, got '1e-400'$"),
        ({"lr": "0.0e5"}, r"--lr must be in \[1e-30, 10\], got 0\.0e5$"),
        ({"lr": "1e400"}, r"--lr must be in \[1e-30, 10\], got 1e400$"),
        ({"packing": "yes"}, "--packing must be bool, got 'yes'$"),
        ({"packing": 1}, "--packing must be bool, got 1$"),
        ({"dataset_num_proc": "0"}, r"--dataset-num-proc must be in \[1, 1024\], got 0$"),
        ({"decay": "1e-400"}, "--decay must be float, got '1e-400'$"),
        ({"lr": "9", "weight_decay": "1"}, "--lr 9.0 times --weight-decay 1.0 must be at most 1"),
        ({"weight_decay": "1e3", "method": "full", "lr": "2e-3"}, "--lr 0.002 times --weight-decay 1000.0 must be"),
        ({"aux_loss": "1", "recompute": "layers"}, "--aux-loss and --recompute layers do not go together"),
        ({"aux_loss": "1", "method": "lora"}, "--aux-loss goes with the methods esft and full"),
        ({"eval_metrics": "x"}, "--eval-metrics must be of "),
        ({"warmup_ratio": "0.1", "warmup_steps": "2"}, "--warmup-steps and warmup_ratio exclude each other"),
        ({"decay": "0.1", "lr_scheduler_type": "cosine"}, "--decay goes with lr_scheduler_type constant"),
        ({"frozen": "nf4", "method": "lora"}, "--frozen nf4 goes with the method esft, not with lora"),
        ({"frozen_linear": "int8", "method": "full"}, "--frozen-linear int8 goes with the method esft, not with full"),
    ):
        with pytest.raises(esft.InputError, match=f"^{message}"):
            TrainConfig.load(None, **arguments)


def test_the_choices_are_those_of_the_kernels():
    assert ("auto", *POOLS_FROZEN) == FROZEN
    assert MODULES_FROZEN == FROZEN_LINEAR


def test_the_choices_are_those_of_the_kernels_and_the_training():
    assert {"loss", "choices", *TEXT_SCORES} == set(SCORES)
    assert tuple(MOMENTS) == OPTIMIZERS
    assert BACKENDS == esft_kernels.BACKENDS and (*esft_kernels.RECOMPUTE, "layers") == RECOMPUTES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: 0}, rf"{name} must be in \[1, (inf\)|65536\]), got 0")
            for name in ("steps", "batch_size", "max_length", "eval_every", "save_every", "lora_alpha")
        ),
        *(({"lora_rank": rank}, rf"lora_rank must be in \[1, 65536\], got {rank}") for rank in (0, 65537)),
        ({"method": "sft"}, "method must be one of esft, full, lora, got 'sft'"),
        ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, float32, got 'int8'"),
        ({"backend": "gpu"}, "backend must be one of auto, .*, got 'gpu'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw_8bit, got 'sgd'"),
        ({"recompute": "all"}, "recompute must be one of none, frozen, layers, got 'all'"),
        ({"packing": "true"}, "packing must be bool, got 'true'"),
        ({"packing": None}, "packing must be bool, got None"),
        ({"eval_packing": 1}, r"eval_packing must be bool \| None, got 1"),
        ({"packing_strategy": "bfd_split"}, "packing_strategy must be one of bfd, wrapped, got 'bfd_split'"),
        ({"micro_batch_size": 0}, r"micro_batch_size must be in \[1, inf\), got 0"),
        ({"micro_batch_size": 9, "batch_size": 8}, "micro_batch_size must be at most batch_size 8, got 9"),
        *(
            ({"lr": lr}, rf"lr must be in \[1e-30, 10\], got {lr}")
            for lr in (-1.0, 0.0, 1e-31, 11.0, math.inf, math.nan)
        ),
        *(({"decay": decay}, f"decay must be in .0, 1., got {decay}") for decay in (-0.1, 1.1, math.nan)),
        *(
            ({name: value}, f"{name} must be in .0, 1., got {value}")
            for name in ("beta1", "beta2")
            for value in (1.0, -0.1, math.nan)
        ),
        *(
            ({name: value}, rf"{name} must be in \[0, 1000\], got {value}")
            for name in ("weight_decay", "aux_loss")
            for value in (-0.1, 1001.0, math.inf, math.nan)
        ),
        ({"lora_alpha": 65537}, r"lora_alpha must be in \[1, 65536\], got 65537"),
        ({"lr": 2.0, "weight_decay": 0.6}, "lr 2.0 times weight_decay 0.6 must be at most 1"),
        ({"aux_loss": 0.1, "recompute": "layers"}, "aux_loss and recompute layers do not go together"),
        ({"aux_loss": 0.1, "method": "lora"}, "aux_loss goes with the methods esft and full, not with lora"),
        *(({"clip": clip}, rf"clip must be in \[1e-8, inf\], got {clip}") for clip in (0.0, 1e-9, -1.0, math.nan)),
        ({"warmup_steps": -1}, r"warmup_steps must be in \[0, inf\), got -1"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\), got 1.0"),
        ({"warmup_ratio": 0.5, "warmup_steps": 1}, "warmup_steps and warmup_ratio exclude each other"),
        ({"decay": 0.5, "lr_scheduler_type": "linear"}, "decay goes with lr_scheduler_type constant, not with linear"),
        ({"lr_scheduler_type": "wsd"}, "lr_scheduler_type must be one of constant, linear, cosine, got 'wsd'"),
        ({"eval_metrics": "loss,bleu"}, "eval_metrics must be of loss, .*, rouge_l, with commas, got 'bleu'$"),
        ({"eval_metrics": "loss, loss"}, "eval_metrics must be of loss, .*, got 'loss' twice$"),
        ({"eval_metrics": ""}, "eval_metrics must be of loss, .*, got ''$"),
        ({"early_stopping_patience": 0}, r"early_stopping_patience must be in \[1, inf\), got 0"),
        ({"early_stopping_threshold": -1.0}, r"early_stopping_threshold must be in \[0, inf\), got -1.0"),
        ({"report_to": "mlflow"}, "report_to must be one of tensorboard, wandb, none, got 'mlflow'"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, r"seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(settings: dict, message: str):
    with pytest.raises(esft.InputError, match=f"^{message}"):
        TrainConfig(**settings)


def test_a_run_resumes_with_other_steps_and_with_nothing_else_changed():
    begun = TrainConfig(method="esft")
    begun.check_resumes(begun)
    TrainConfig(steps=7).check_resumes(begun)
    assert set(OTHER) == {field.name for field in fields(TrainConfig)}
    for name in OTHER.keys() - {"steps"}:
        value = OTHER[name]
        with pytest.raises(esft.InputError, match=f"cannot resume with {name} {value}: the run was begun with "):
            TrainConfig(**{name: value}).check_resumes(begun)
    with pytest.raises(esft.InputError, match="cannot resume with seed 0: the run was begun with 5$"):
        begun.check_resumes(TrainConfig(seed=5))


def test_a_stream_holds_no_more_records_than_memory_has_room_for():
    most = {"streaming": True, "steps": 1, "batch_size": 1 << 14}
    assert TrainConfig(**most).streaming
    with pytest.raises(esft.InputError, match="^batch_size must be at most 16,384 with streaming: 32 batches"):
        TrainConfig(**(most | {"batch_size": (1 << 14) + 1}))


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(esft.InputError, match="c.yaml: not UTF-8"):
        TrainConfig.load(tmp_path / "c.yaml")


def test_all_is_both_that_processes_can_share():
    shared = {shard: TrainConfig(shard=shard) for shard in ("none", "frozen", "experts", "all")}
    assert {shard for shard, config in shared.items() if config.cuts_frozen} == {"frozen", "all"}
    assert {shard for shard, config in shared.items() if config.deals_experts} == {"experts", "all"}


def test_evaluation_data_decides_where_the_best_is_kept_or_patience_ends():
    assert TrainConfig(metric_for_best_model="loss").chooses is None
    assert TrainConfig(load_best_model_at_end=True, early_stopping_patience=1).chooses == "load_best_model_at_end"
    assert TrainConfig(early_stopping_patience=1).chooses == "early_stopping_patience"
    assert TrainConfig(eval_metrics="chrf , loss").scores == ["chrf", "loss"]


def test_esft_needs_a_selection_and_the_other_methods_take_none():
    some, none = ExpertSelection({1: [0]}), ExpertSelection({1: []})
    TrainConfig().check_selection(some)
    for method in ("full", "lora"):
        TrainConfig(method=method).check_selection(None)
        with pytest.raises(esft.InputError, match=f"^method {method} takes no expert selection$"):
            TrainConfig(method=method).check_selection(some)
    with pytest.raises(esft.InputError, match="^method esft needs expert selection$"):
        TrainConfig().check_selection(None)
    with pytest.raises(esft.InputError, match="^the expert selection is empty: nothing would train$"):
        TrainConfig().check_selection(none)
