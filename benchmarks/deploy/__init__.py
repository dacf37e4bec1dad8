"""Time, memory and size of every form of five models, side by side: `measure` runs, `page` writes docs/deploy.md."""
