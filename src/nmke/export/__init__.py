"""Writing an edited model in the formats others load; every format registers itself in `exporters`."""

from nmke.export import delta as delta
from nmke.export import gguf as gguf
from nmke.export import hf as hf
from nmke.export import lora as lora
from nmke.export.base import Exporter, ExportReport, exporters

__all__ = ["ExportReport", "Exporter", "exporters"]
