"""Words: the dictionary, in any form and in groups, fragments completed, words of text that works exchanged."""
