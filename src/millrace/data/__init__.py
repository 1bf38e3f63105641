"""From files to immutable dataset versions."""

from millrace.core.ports import StageDescriptor

DATA = StageDescriptor(
    name="data",
    implementation="millrace.data.prepare:prepare",
    version="1",
    sections=("data",),
    outputs=("dataset",),
    distributions=("polars", "pyarrow"),
    extras=(("polars", "data"), ("pyarrow", "data")),
    uses_source=True,
)
