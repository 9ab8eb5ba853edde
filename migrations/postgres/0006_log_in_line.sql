-- An entry that fits a page stays in it. Out of line it would go in pieces of 2 KB, each with an entry of an index: half of what an append cost.
ALTER TABLE log SET (toast_tuple_target = 8160);
