"""Turn any runs and evaluations into one self-contained page: scores, curves, answers, rollouts.

    python report.py --run out/speedrun
    python report.py --eval out/eval/base-test out/eval/rl-test --out compared.html
    python report.py --run out/rl-a out/rl-b

--run takes a folder of train_sft.py or train_rl.py, or one that holds several such folders and
evaluations, as the speedrun's does, and takes it whole. --eval takes folders of eval.py, benchmarks
included. The page is written into the first folder; it needs no network, now or later.

Scores: evaluations of the same questions stand side by side, and each is compared with the first,
question by question. Where the first has no such path, its own is taken: so a base model's direct
answers are compared with both paths of a trained one. What an error is: eval.py. The differences of
accuracy and reward are printed, too.
Curves: whatever a run logged gets one; runs of one script share their axes.
Questions: all of them (--questions limits how many of a set), failures first, to be filtered and
searched. An answer is right if it earns at least half of the accuracy there is; of a benchmark, by
our robust scorer. The data have to lie where eval.py read them, else there are texts alone.
Rollouts: what rollouts.jsonl has, step by step.

The modules and the page's markup are in reporting/.
"""

import python_version  # noqa: F401

# isort: split

from dataclasses import dataclass
from pathlib import Path

import flags
from errors import UserError, launch, writing
from flags import CountOrZero


@dataclass
class Config:
    run: tuple[str, ...] = ()  # folders of runs, each taken with what lies in it
    eval: tuple[str, ...] = ()  # folders of evaluations; the first is what others are compared with
    out: str = ""  # the page; "": report.html in the first folder
    questions: CountOrZero = 2000  # of each set, shown in the gallery at most; 0: none

    def __post_init__(self):
        flags.check(self)
        if not (self.run or self.eval):
            raise UserError("there is nothing to report: give --run or --eval")


def main(config: Config) -> None:
    from reporting.page import page  # here: --help needs none of it
    from reporting.runs import collect, comparisons
    from reporting.tables import difference_lines, headline

    runs, evals = collect(config.run, config.eval)
    folder = Path([*config.run, *config.eval][0])
    out = Path(config.out or folder / "report.html")
    text = page(runs, evals, config.questions, folder.resolve().name)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    found = comparisons(evals)
    print(headline(found)[0])
    for comparison in found:
        for line in difference_lines(comparison):
            print(line)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    launch("report.py", main, flags.parse(Config, __doc__))
