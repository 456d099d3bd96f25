"""Run the tour without a browser: out/tour.ipynb, out/tour.html, out/metrics.json."""
import json
import sys
import time
from pathlib import Path

from erwin_nsa.explore.report import ANSI, execute_notebook, write_report

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out"
PRODUCTS = [OUT / name for name in ("tour.ipynb", "tour.html", "metrics.json")]


def lines_of(values, name="") -> list:
    "Nested metrics, one line for each innermost group."
    if isinstance(values, dict) and name and not any(isinstance(v, (dict, list)) for v in values.values()):
        return [f"  {name}: " + ", ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in values.items())]
    if isinstance(values, dict):
        return [line for key, value in values.items() for line in lines_of(value, f"{name} / {key}" if name else str(key))]
    if isinstance(values, list) and any(isinstance(v, (dict, list)) for v in values):
        return [f"  {name}: {len(values)} entries"]
    if isinstance(values, list):
        values = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values[:6]) + (" ..." if len(values) > 6 else "")
    return [f"  {name}: {values:.4g}" if isinstance(values, float) else f"  {name}: {values}"]


def main() -> int: # exit status
    "Execute, convert, report; nothing of an earlier run is left to be mistaken for this one's."
    start = time.monotonic()
    OUT.mkdir(exist_ok=True)
    for product in PRODUCTS: product.unlink(missing_ok=True)
    try:
        execute_notebook(ROOT / "nbs/tour.ipynb", PRODUCTS[0], env={"ERWIN_NSA_OUT": str(OUT)}, timeout=600)
        figures = write_report(PRODUCTS[0], PRODUCTS[1])
    except Exception as error: # of the notebook: its cell and traceback are printed already
        print(f"demo: failed after {time.monotonic() - start:.0f} s: {type(error).__name__}: {ANSI.sub('', str(error)).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    missing = [product for product in PRODUCTS if not product.is_file()]
    if missing:
        print(f"demo: the tour ran but wrote no {', '.join(map(str, missing))}", file=sys.stderr)
        return 1
    print(f"\ndemo: done in {time.monotonic() - start:.0f} s")
    print(f"  {PRODUCTS[1]}  ({figures} interactive figures; open it in a browser)")
    print(f"  {PRODUCTS[2]}")
    print("\n".join(lines_of(json.loads(PRODUCTS[2].read_text()))))
    return 0


if __name__ == "__main__": sys.exit(main())
