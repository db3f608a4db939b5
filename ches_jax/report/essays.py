"""Texts that explain a page, folded away until opened."""

SCORE_READING = (
    "When a model is trained on preference pairs with DPO or a relative of it, the chosen response can lose "
    "probability together with the rejected one, and the mass moves to something else. This is likelihood "
    "displacement. Scores of a pair measure, before any training, how far what lowers the rejected response also "
    "lowers the chosen one.",
    "The head score adds up the exact inner products of the gradients with respect to the unembedding matrix. It is a "
    "first-order effect of a pair on itself: after fine-tuning on the chosen responses, what the other pairs do weighs "
    "more, and a forecast of the whole data set tells better than any score of a pair alone.",
    "CHES (centered hidden embedding similarity) adds up the model's last hidden states over each response, takes the "
    "inner product of the two sums, and subtracts the squared length of the chosen sum. Identical responses score 0; "
    "below 0 the rejected response reaches less far than the chosen one in the chosen direction; above 0 it reaches "
    "further. ln-CHES is the same with means in place of sums; it is the version the paper used for filtering.",
    "Higher means more similar and more at risk. Only the order of pairs on one model matters: values do not compare "
    "across models.",
)
SCORE_LIMITS = (
    "Plain CHES goes with length: hidden states mostly have positive inner products, so a rejected response that "
    "is longer than the chosen one raises it. Look at the correlations before a selection by CHES is "
    "credited to similarity, and compare with the length and random controls of ches select.",
    "Leaving pairs out, after fine-tuning on the chosen responses: without the half of highest influence held-out ones "
    "fell by 1.8 nats less than with all pairs, without the half of highest CHES by 1.4 less, of highest head score by "
    "0.9 less, of longest rejected by 0.5 less, of highest ln-CHES by 0.5 more; all at less margin "
    "(experiments/README.md).",
    "Whether similar pairs should be dropped is debated. The paper found that keeping the 5% of pairs with the "
    "lowest ln-CHES kept safety-tuned models from unlearning refusals, although the chosen responses still lost "
    "probability. Others find pairs with a minimal surface difference the most instructive. The two agree where "
    "the edit is small and the meaning differs.",
    "A score is a prediction from the untrained model, not a measurement of displacement: that takes the "
    "log-probabilities before and after training (ches diagnose). And displacement is not harm: mass can move "
    "to responses just as good.",
)
CHANGE_READING = (
    "A run of preference optimisation is displaced when the log-probabilities of its chosen responses fall while the "
    "loss falls: the mass goes to responses that nobody chose. The changes are since the first model, summed over the "
    "tokens of a response, in nats (natural logarithms).",
    "Regimes of a pair: wanted (chosen up, rejected down), both up and both down, margin up (both moved the same way "
    "and the margin grew), inverted (the margin fell), together (both moved, the margin did not), flat (neither did).",
)
CHANGE_LIMITS = (
    "That chosen responses fell is not yet harm: whether the mass went to unwanted responses takes generated texts or "
    "probe responses, and whether quality fell takes a judge. Training pairs move more than held-out ones.",
)
