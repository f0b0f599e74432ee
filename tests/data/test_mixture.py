"""Mixtures: shares by hash, whatever the order; bounded memory; the shipped files; from files to a
training step."""

import json
import random
import tracemalloc

import numpy as np
import pytest
import rooms
from commands import ROOT
from PIL import Image

import data
from data.mixture import Part, parse_source
from data.rows import Row
from data.sources import open_source
from errors import UserError


@pytest.fixture
def many(tmp_path):
    """1,000 rows of our own format about one image."""
    rooms.save(Image.new("RGB", (32, 24)), tmp_path / "a.png")
    rows = [
        {
            "id": str(k),
            "path": ("lor", "dtr")[k % 2],
            "images": ["a.png"],
            "question": "?",
            "answer": "1",
        }
        for k in range(1000)
    ]
    return rooms.jsonl(tmp_path / "rows.jsonl", rows)


def ids(*sources):
    return [e.id for e in data.load(sources)]


def test_shares_and_caps(many):
    share = ids(f"{many},weight=0.1")
    assert 70 < len(share) < 130 and share == ids(f"{many},weight=0.1") == ids(
        f"scenes:{many},weight=.1"
    )
    assert set(share) < set(ids(f"{many},weight=0.3")) and sorted(share, key=int) == share
    assert len(ids(f"{many},cap=70")) == 70 and set(ids(f"{many},cap=70")) < set(
        ids(f"{many},cap=71")
    )
    assert set(ids(f"{many},weight=0.1,cap=20")) == set(ids(f"{many},cap=20"))
    other = ids(f"{many},weight=0.1,seed=1")
    assert other != share and 70 < len(other) < 130
    assert {e.path for e in data.load([f"{many},path=dtr"])} == {"dtr"}
    assert len(ids(f"{many},path=dtr,weight=1")) == 500


def test_the_share_depends_on_the_ids_alone(many):
    lines = many.read_text().splitlines(keepends=True)
    before = {source: set(ids(source)) for source in (f"{many},weight=0.2", f"{many},cap=50")}
    random.Random(0).shuffle(lines)
    many.write_text("".join(lines))
    assert all(set(ids(source)) == share for source, share in before.items())
    # of half the rows: that half's part
    many.write_text("".join(lines[:500]))
    kept = {json.loads(line)["id"] for line in lines[:500]}
    assert set(ids(f"{many},weight=0.2")) == before[f"{many},weight=0.2"] & kept


def test_places_are_uniform():
    part = Part("x")
    places = np.sort([part.place(Row("f", 1, str(k), None)) for k in range(5000)])
    # Kolmogorov-Smirnov, 1 %
    assert np.abs(places - np.arange(5000) / 5000).max() < 1.63 / 5000**0.5


def test_a_mixture_file(many, monkeypatch):
    file = many.parent / "mix.toml"
    monkeypatch.setenv("HERE", str(many.parent))
    file.write_text(
        'seed = 3\n[[source]]\ndata = "scenes:$HERE"\nweight = 0.2\npath = "lor"\n'
        '[[source]]\ndata = "$HERE/rows.jsonl"\ncap = 40\nseed = 0\npath = "dtr"\n'
    )
    wanted = ids(f"{many},weight=.2,seed=3,path=lor", f"{many},cap=40,seed=0,path=dtr")
    assert ids(file) == wanted and 0 < len(wanted) < 200


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "a list of .*source"),
        ("seed = 1", "a list of .*source"),
        ('[source]\ndata = "x"', "a list of .*source"),
        ("[[source]]\nweight = 1", "each with `data`"),
        ("[[source]]\ndata = 1", "each with `data`"),
        ('[[source]]\ndata = "x"\nshare = 1', "unknown key share"),
        ('colour = 1\n[[source]]\ndata = "x"', "unknown key colour"),
        ('[[source]]\ndata = "$UNSET_HERE/x"', "UNSET_HERE.*not set"),
        ('[[source]]\ndata = "x"\nweight = 0', "0 < weight <= 1000"),
        ('[[source]]\ndata = "x"\nweight = inf', "weight=inf"),
        ('[[source]]\ndata = "x"\nweight = "a"', "x: weight=a"),
        ('[[source]]\ndata = "x"\ncap = 0', "cap >= 1"),
        ('[[source]]\ndata = "x"\ncap = 1.5', "x: .*cap=1.5"),
        ('[[source]]\ndata = "x"\nseed = 1.5', "seed=1.5"),
        ('[[source]]\ndata = "x"\npath = "cot"', "path one of"),
        ("seed = ", "mix.toml: Invalid value"),
        ('[[source]]\ndata = "nowhere"', "no such file or folder: nowhere"),
        ('[[source]]\ndata = "other.toml"', "other.toml: a mixture can't hold another"),
        ('[[source]]\ndata = "vqa:x"\nimage = ""', "vqa:x: image= is empty"),
        ('[[source]]\ndata = "vqa:x"\nimage = 5', "names .* as text"),
    ],
)
def test_a_bad_mixture_says_what_is_wrong(tmp_path, text, match):
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(UserError, match=match):
        data.load([tmp_path / "mix.toml"])


def test_a_mixture_takes_no_options_from_outside(tmp_path):
    (tmp_path / "mix.toml").write_text('[[source]]\ndata = "x"')
    with pytest.raises(
        UserError, match="mix.toml: a mixture's shares stand in the file: weight, cap"
    ):
        data.load([f"{tmp_path / 'mix.toml'},weight=.5,cap=3"])


def test_occlusion_is_an_option_of_spar_alone(many):
    assert Part("spar:x", occlusion="off").occlusion == "off"
    for source, value in ((str(many), "off"), ("spar:x", "no")):
        with pytest.raises(UserError, match=f"occlusion={value}: it is on, or off for a spar:PATH"):
            data.load([f"{source},occlusion={value}"])


def test_a_source_may_have_commas_in_its_path(many):
    folder = many.parent / "a,weight=1"
    folder.mkdir()
    many.rename(folder / "rows.jsonl")
    (many.parent / "a.png").rename(folder / "a.png")
    assert len(ids(folder)) == 1000


def test_a_big_array_passes_in_bounded_memory(tmp_path):
    row = {
        "filename": "a",
        "bbox": [[0, 0, 9, 9]],
        "conversations": [
            {"from": "human", "value": "How wide is <mask> <depth>?" + "." * 300},
            {"from": "gpt", "value": "1 m."},
        ],
    }
    file = tmp_path / "big.json"
    file.write_text(
        "[" + ",".join(json.dumps(row | {"filename": f"{k}"}) for k in range(3000)) + "]"
    )
    assert file.stat().st_size > 1.3e6
    part = Part(f"spatialrgpt:{file}", weight=0.005)
    list(part.share(open_source(f"spatialrgpt:{file}")))  # imports, caches
    tracemalloc.start()
    taken = list(part.share(open_source(part.source)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4 < len(taken) < 40 and peak < 400_000


def test_a_share_still_reports_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(data.BadRows, match="empty file"):
        data.load([f"{tmp_path / 'empty.jsonl'},weight=0.0001"])


@pytest.mark.parametrize("name", ["sft_mixture", "rl_mixture"])
def test_the_shipped_mixtures_name_known_kinds(name, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="not set"):
        parse_source(str(ROOT / "runs" / f"{name}.toml"))
    for variable in [
        "COLD",
        "OMNI3D",
        "CA1M",
        "SPATIALRGPT",
        "OPENIMAGES",
        "REFCOCO",
        "COCO",
        "LLAVA",
        "LLAVA_IMAGES",
        "REGIONS",
        "REGION_IMAGES",
        "SPAR",
    ]:
        monkeypatch.setenv(variable, str(tmp_path))
    found = parse_source(str(ROOT / "runs" / f"{name}.toml"))
    assert len(found) == {"sft_mixture": 12, "rl_mixture": 2}[name]
    # the rest are benchmarks'
    train = {"omni3d": "_train.json@", "ca1m": "/train", "spar": "/train"}
    assert all(train.get(part.source.partition(":")[0], "") in part.source for part in found)
    assert all(part.source.partition(":")[0] in {*data.SOURCES, str(tmp_path)} for part in found)


# ---- all sources at once, through the processor, to a step of training


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A mixture of every kind, each a room in its own schema."""
    import test_embodiedscan
    import test_grounding
    import test_llava
    import test_spatialrgpt

    folder, one, two = tmp_path_factory.mktemp("sets"), rooms.rich(1, 3), rooms.rich(2, 4)
    names = ["spar", "srreal", "llava", "spatialrgpt", "omni3d", "ca1m", "refcoco"]
    for name in names:
        (folder / name).mkdir()
    sources = [test_embodiedscan.spar(folder / "spar", two, views=2)]
    test_embodiedscan.write(folder / "spar" / "embodiedscan_infos_train.pkl", two[0])
    test_llava.pictures(two[0], folder / "srreal")
    rows = [test_llava.one_view(two) | {"cot": "Near."}, test_llava.two_views(two)]
    (folder / "srreal" / "rows.json").write_text(json.dumps(rows))
    chat = [{"image": "0.png", "conversations": test_llava.said("What is it?", "A room.")}]
    (folder / "llava" / "chat.json").write_text(json.dumps(chat))
    rooms.save(one[0].images[0], folder / "spatialrgpt" / "0a1b2c.jpg")
    test_spatialrgpt.write(folder / "spatialrgpt", test_spatialrgpt.row(one))
    omni3d = test_grounding.omni3d(folder / "omni3d", one)
    test_grounding.ca1m(folder / "ca1m", one)
    rooms.save(one[0].images[0], folder / "refcoco" / "COCO_0.jpg")
    rooms.jsonl(folder / "refcoco" / "r.jsonl", [test_grounding.reference(one)])
    sources += [
        f"srreal:{folder}/srreal/rows.json",
        f"llava:{folder}/llava/chat.json@{folder}/srreal",
        omni3d,
        f"spatialrgpt:{folder}/spatialrgpt/result_10_depth_convs.json",
        f"ca1m:{folder}/ca1m",
        f"refcoco:{folder}/refcoco/r.jsonl",
    ]
    return folder, sources


def test_every_kind_in_one_mixture(everything):
    _, sources = everything
    read = data.load(sources)
    assert {e.path for e in read} == {"lor", "dtr", "direct"} and len(
        read
    ) == 2 + 2 + 1 + 11 + 2 + 11 + 2
    assert len({(e.id, e.path) for e in read}) == len(read) and data.load(sources) == read


def test_from_files_to_a_training_step(everything, tmp_path):
    import torch

    import train_sft
    from model.processor import Processor
    from model.tiny import write

    folder, sources = everything
    torch.set_num_threads(1)
    write("qwen2_5_vl", tmp_path / "tiny")
    # SPAR's rows have no rationale to learn
    teach = sources[1:]
    read = data.load(sources)
    batch = Processor.from_pretrained(tmp_path / "tiny", max_pixels=56 * 56)(read)
    assert len(batch.region_token) == sum(len(e.regions) for e in read) and len(batch.last) == len(
        read
    )
    truths = sum(len(e.objects) for e in read if e.path == "direct")
    assert int(torch.isfinite(batch.centres).all(1).sum()) >= truths > 0
    config = train_sft.Config(
        str(tmp_path / "tiny"),
        tuple(teach),
        str(tmp_path / "run"),
        steps=1,
        batch=12,
        max_pixels=56 * 56,
    )
    train_sft.main(config)
    (row,) = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert 0 < row["loss"] < 100 and row["head_error_metres"] > 0
