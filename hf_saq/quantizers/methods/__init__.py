"""The quantizers of the literature, one file each: LSQ, LSQ+, LIQ, PACT and DoReFa."""
