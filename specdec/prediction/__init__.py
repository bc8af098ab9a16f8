"""The acceptance of trees and rules that were never run, from texts that the target wrote alone.

The only error is that the texts are a sample. The text of a lossless run has the target's law, whatever is drafted. So take a
text as given, and ask how a run would cut it into steps. Where a step begins, the rest of the text has the target's law again.
Let s_i be the chance, given the text, that a step beginning at place t accepts at least i drafted tokens. Then the step ends
after i + 1 tokens with chance s_i - s_(i+1), and

    b_0 = 1,  b_(t+i+1) += b_t (s_i - s_(i+1))

gives the chance b that a step begins at each place. These chances add up to the expected number of steps, without any sampling
of steps.

>>> found = texts(target, ModelDrafter(draft), prompt, sampling=Sampling(1.0))
>>> acceptance_length(found, Widths([3, 2]), TraversalVerification())  # of a tree that nobody ran

Likewise of networks on the target's states, and of its own layers: `texts(target, LayerSkipDrafter(exit_layer=3), prompt)`.
`replay` tells the steps of drafters whose trees have no fixed shape but follow from the text, such as n-grams.

The s_i follow the text's next tokens down the tree. What the rules here do at a node depends only on which children failed, and
the law owed to a later child does not depend on their tokens. So let a node be entered, with the target's law p after it, and
let r be the chance that it or something below it is accepted:

- A child whose turn comes has token x with chance q(x), where q is its law. The child, or something below it, is accepted with
  chance r' = min(1, r p(x) / q(x)).
- It fails with chance 1 - sum min(r p, q). Then the next child has its turn, with the r and p of `residual`.
- Traversal verification enters the child with r'. On a chain it is block verification: s_i = min(s_(i-1), Q_i / P_i), where
  Q_i and P_i are the draft's and the target's probability of the next i tokens.
- Sibling rejection first accepts the child, with chance r', and then enters it with 1.

Divided by the target's own chance p(x) to write x, these are chances given the text, because the text goes on by the target's
law whatever was accepted. In greedy decoding s_i is 1 while the text is in the tree, and 0 from there on.
"""

from specdec.prediction.along import read_along, texts
from specdec.prediction.replay import replay
from specdec.prediction.text import NotForetold, Text, acceptance_length

__all__ = ["NotForetold", "Text", "acceptance_length", "read_along", "replay", "texts"]
