"""Pictures, curves and one self-contained HTML page."""
