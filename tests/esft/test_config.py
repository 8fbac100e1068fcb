import pytest
from esft.config import TrainConfig

import esft


def test_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.steps, config.batch_size, config.max_length, config.eval_every) == (500, 32, 4096, 100)
    assert (config.beta1, config.beta2, config.weight_decay, config.clip) == (0.9, 0.95, 0.1, 1.0)
    rates = {method: TrainConfig(method=method).rate(0) for method in ("esft", "full", "lora")}
    assert rates == {"esft": 1e-5, "full": 3e-5, "lora": 1e-4}


def test_arguments_override_the_file_and_yaml_floats_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nsteps: 7\n")
    config = TrainConfig.load(tmp_path / "c.yaml", steps=9, seed=None)
    assert (config.lr, config.steps, config.seed) == (1e-3, 9, 0)


def test_a_saved_config_loads_again(tmp_path):
    config = TrainConfig(method="lora", lr=0.5, decay=0.25)
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.load(tmp_path / "c.yaml") == config


def test_the_rate_warms_up_holds_and_falls():
    config = TrainConfig(lr=1.0, steps=10, warmup_steps=1, decay=0.5)
    assert [round(config.rate(step), 2) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "no setting 'stepz'"),
        ("steps: many", "steps must be int, got 'many'"),
        ("steps: 2.5", "steps must be int"),
        ("steps: 0", "steps must be at least 1"),
        ("lr: -1", "lr must be above 0"),
        ("aux_loss: -1", "aux_loss must be at least 0 and finite"),
        ("micro_batch_size: 0", "micro_batch_size must be from 1 to batch_size"),
        ("{micro_batch_size: 9, batch_size: 8}", "micro_batch_size must be from 1 to batch_size, got 9"),
        ("micro_batch_size: 1.5", "micro_batch_size must be int"),
        ("recompute: all", "recompute must be one of none, frozen, layers"),
        ("{aux_loss: 0.1, recompute: layers}", "aux_loss and recompute layers do not go together"),
        ("{aux_loss: 0.1, method: lora}", "aux_loss goes with the methods esft and full"),
        ("lr: .inf", "lr must be above 0 and finite"),
        ("lr: true", "lr must be float"),
        ("beta1: 1", "beta1 must be in"),
        ("beta2: .nan", "beta2 must be in"),
        ("weight_decay: -0.1", "weight_decay must be at least 0"),
        ("clip: null", "clip must be float"),
        ("backend: gpu", "backend must be one of"),
        ("seed: -1", "seed must be at least 0"),
        ("steps: .inf", "steps must be int"),
        ("method: sft", "method must be one of"),
        ("decay: 2", "decay must be in"),
        ("dtype: int8", "dtype must be"),
        ("- 1", "not a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_settings_are_named(tmp_path, text: str, message: str):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(esft.InputError, match=message):
        TrainConfig.load(tmp_path / "c.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(esft.InputError, match="c.yaml: not UTF-8"):
        TrainConfig.load(tmp_path / "c.yaml")
