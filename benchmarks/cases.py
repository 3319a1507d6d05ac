"""The cases that the suite measures itself, by name, in the order in which they run."""

from fastclip.benchmarks.clip import ClipCase
from fastclip.benchmarks.loading import LoadingCase
from fastclip.benchmarks.retrieval import RanksCase, TopkCase
from fastclip.benchmarks.siglip import SiglipCase
from fastclip.benchmarks.step import StepCase

CASES = {case.name: case for case in (ClipCase(), SiglipCase(), RanksCase(), TopkCase(), StepCase(), LoadingCase())}
