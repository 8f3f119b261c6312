"""The benchmark as a program."""

from tests.launch import process


def test_an_unknown_baseline_is_refused_by_name():
    done = process.run("benchmark", "--against=hooks,pyvene")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("--against=pyvene: not one of hooks, prefix")


def test_more_neurons_than_there_are_is_refused_before_any_work():
    done = process.call("benchmark", "--layers=1", "--neurons=4000")
    assert done.returncode == 1
    assert "neurons=4000: the model has 3072" in done.stderr


def test_flags_that_would_say_nothing_are_refused():
    done = process.call("benchmark", "--accuracy", "--rounds=2")
    assert done.returncode == 1
    assert "--rounds says nothing to --accuracy" in done.stderr
    done = process.call("benchmark", "--compile_for=v5e:2x2", "--profile=p")
    assert done.returncode == 1
    assert "--profile says nothing to --compile_for" in done.stderr
    done = process.call("benchmark", "--profile=/dev/null/p")
    assert done.returncode == 1
    assert "--profile=/dev/null/p is no folder to write to: [Errno 20]" in done.stderr
    done = process.call("benchmark", "--json=/nowhere/figures.json")
    assert done.returncode == 1
    assert "--json=/nowhere/figures.json: its folder cannot be written" in done.stderr


def test_lists_and_generation_refuse_what_would_say_nothing_to_them():
    done = process.call("benchmark", "--lists", "--neurons=8")
    assert done.returncode == 1
    assert "--neurons says nothing to --lists" in done.stderr
    done = process.call("benchmark", "--generate", "--matmul_precision=auto,split2")
    assert done.returncode == 1
    assert "--generate: --matmul_precision=split2: not one of auto, float32, split3" in done.stderr
    done = process.call("benchmark", "--against_types=bfloat16")
    assert done.returncode == 1
    assert "--against_types needs --against=K" in done.stderr


def test_compiling_refuses_what_would_say_nothing_to_it():
    done = process.call("benchmark", "--compile_for=v5e:2x2", "--rounds=2")
    assert done.returncode == 1
    assert "--rounds says nothing to --compile_for" in done.stderr
    done = process.call("benchmark", "--rows=8")
    assert done.returncode == 1
    assert "--rows needs --generate or --compile_for=K" in done.stderr
    done = process.call("benchmark", "--compile_for=v5e:2x2", "--model=m", "--preset=llama-3.2-1b")
    assert done.returncode == 1
    assert "--preset says nothing to --model, whose config.json gives the shape" in done.stderr
    done = process.call("benchmark", "--compile_for=v5e:2x2", "--matmul_precision=float32,half")
    assert done.returncode == 1
    assert "--matmul_precision=half: not one of auto" in done.stderr
