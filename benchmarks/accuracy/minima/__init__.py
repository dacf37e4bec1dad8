"""What do the minima look like that the methods of the accuracy benchmark find, and where should their bits go?

`make flatness` runs `flatness` (is the minimum of SAQ flatter than that of QAT, and does that predict accuracy?) and
`make mixed-precision` runs `bit_budget` (bits for a budget against the same bits everywhere). `measured` trains one
model and looks at it. `findings` draws conclusions, `page` writes docs/flatness.md from them.
"""
