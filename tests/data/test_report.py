"""The report of faults: counting, merging over batches, workers and processes, judging."""

import multiprocessing

import pytest
import torch.distributed as dist

from fastclip.data.report import KINDS, MENDED, NAMES_KEPT, REFUSED, SKIPPED, DataReport, merged_over_ranks
from fastclip.errors import UserError


def report(samples=0, duplicates=0, **counts) -> DataReport:
    made = DataReport(samples, duplicates)
    for kind, count in counts.items():
        for i in range(count):
            made.add(kind.replace("_", " "), f"{kind}-{i}")
    return made


def test_merging_adds_counts_and_keeps_the_first_names():
    total = report(10, 1, bad_image=3)
    total.merge(report(5, 2, bad_image=4, missing_caption=1))
    assert (total.samples, total.duplicates, total.skipped) == (15, 3, 8)
    assert total.counts == {"bad image": 7, "missing caption": 1}
    assert total.names["bad image"] == ["bad_image-0", "bad_image-1", "bad_image-2", "bad_image-0", "bad_image-1"]
    assert len(total.names["bad image"]) == NAMES_KEPT
    assert DataReport.from_dict(total.to_dict()) == total


def test_only_samples_that_cannot_be_used_count_as_skipped():
    assert len(KINDS) == len({*SKIPPED, *REFUSED, *MENDED})
    assert report(10, bad_UTF_8=0, long_caption=3, member_not_read=5).skipped == 0
    report(10, long_caption=30, member_not_read=50).check(0.0, final=True)


def test_the_share_is_judged_from_100_samples_on_or_at_the_end():
    few = report(90, bad_image=9)
    few.check(0.05)
    with pytest.raises(UserError, match="9 of 99"):
        few.check(0.05, final=True)
    with pytest.raises(UserError, match=r"10 of 100 .* bad image 10 \(bad_image-0, .*, \.\.\.\)"):
        report(90, bad_image=10).check(0.05)
    report(90, bad_image=10).check(0.1)


def gather(rank: int, folder: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results.put(merged_over_ranks(report(10 + rank, bad_image=rank, missing_image=1)).to_dict())
    dist.destroy_process_group()


def test_reports_of_two_processes_are_summed_on_both(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=gather, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert (
        found[0]
        == found[1]
        == {
            "samples": 21,
            "duplicates": 0,
            "counts": {"missing image": 2, "bad image": 1},
            "names": {"missing image": ["missing_image-0"] * 2, "bad image": ["bad_image-0"]},
        }
    )


def test_without_processes_the_report_is_its_own_sum():
    alone = report(3, bad_image=1)
    assert merged_over_ranks(alone) is alone
