from benchmarks.plan import MEMORY, MODELS, WAYS, run
from esft.planning.outline import outline


def test_the_models_have_the_sizes_that_are_published():
    billions = {
        "olmoe-1b-7b": 6.9, "deepseek-v2-lite": 15.7, "qwen3-30b-a3b": 30.5, "gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8,
        "glm-4.5-air": 106.9, "deepseek-v3": 671.0,
    }  # fmt: skip
    assert {folder.name for folder in MODELS.iterdir()} == billions.keys()
    for name, size in billions.items():
        assert round(outline(str(MODELS / name)).parameters / 1e9, 1) == size


def test_a_row_has_the_peak_of_every_way_and_the_first_that_fits_each_memory():
    (row,) = run(["olmoe-1b-7b"], experts=1, records=2, tokens=64)
    peaks = {way: float(row[f"peak: {way}"]) for way in WAYS}
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for memory in MEMORY:
        fits = [way for way, peak in peaks.items() if peak <= memory]
        assert row[f"{memory} GB"] == (fits[0] if fits else "no")
