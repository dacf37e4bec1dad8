"""Which further ways to pay less for sharpness, or to gain more from it, deserve a place in the package?

`make ways` runs `sweep`, which holds the protocol and writes the page at its end.

Comes in: scikit-learn's digits. Goes out: `benchmarks/results/ways/*.json`, one for each task and way; docs/ways.md.
Must not know: other rooms. What is tried here lives here (`rules`, `shapes`, `averaging`, `freezing`), so that the
package stays free of what loses.
"""
