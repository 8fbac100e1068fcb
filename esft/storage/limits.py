"""The largest of everything that is read: far above what exists, and small enough that reading it ends."""

JSON_BYTES = 1 << 28  # of a JSON file; the index of a checkpoint with a million tensors has half
METRICS_BYTES = 1 << 30  # of a run's figures; those of a million steps have a fifth
SETTINGS_BYTES = 1 << 16  # of a YAML file of settings, whose parser is slow
NESTED = 20  # levels of YAML; settings have one
LAYERS = 500  # of which a step is planned within a minute
EXPERTS = 65_536  # of a layer
EXPERTS_IN_ALL = 1 << 20
SIZE = 1 << 24  # of one dimension of a model: hidden size, vocabulary, heads
TEXT = 1 << 24  # characters of a record; of so many without a blank a tokenizer took 26 s and 3.3 GB
RENDERED = 1 << 30  # bytes that a chat template may take for it
ENCODING = 20  # seconds that template and tokenizer may take for it, which have it done in milliseconds
DEPTH = 256  # folders of a path
SHOWN = 80  # characters of a bad value in a message
UNFOLDED = 200  # times its size that compressed data may have; text has ten or twenty
UNFOLDED_BYTES = 1 << 26  # and what it may have in any case
