"""Where every artifact comes from: the records that stages leave, and the graph that they form."""
