import json
from pathlib import Path

import pytest

RUN = """
model: models/tiny-moe
output: unused
data: {train: [train.jsonl], valid: [valid.jsonl]}
evaluation: {data: eval.jsonl}
"""


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """Two tasks, two methods of which one tries two learning rates, two seeds."""
    (tmp_path / "run.yaml").write_text(RUN)
    content = {
        "output": str(tmp_path / "sweep"),
        "run": str(tmp_path / "run.yaml"),
        "tasks": {"intent": ["evaluation.metric=intent"], "licence": ["data.train=[l.jsonl]"]},
        "methods": {"token": ["select.top_p=0.3"], "full": ["method=full"]},
        "seeds": [3, 4],
        "learning_rates": {"full": [1e-5, 0.001]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(content))
    return path
