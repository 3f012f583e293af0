"""Model folders of other tools: key maps in both directions."""
