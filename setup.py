"""What pyproject.toml can't say: config and published figures lie beside the packages, and go into the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = ("conf", "results/published.csv")  # not results/checkpoints: 100 MB that a package index would not take


class WithFiles(build_py):
    """Copies `SHIPPED` to harness/shipped in the build; an editable install reads them where they are."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib) / "harness" / "shipped" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(ROOT / name, target)


setup(cmdclass={"build_py": WithFiles})
