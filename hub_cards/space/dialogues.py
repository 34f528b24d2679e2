"""Examples to begin with: the turns of a dialogue, and what could be said next."""

EXAMPLES = {
    "A weekend outdoors": (
        ["Hi! How was your weekend?", "Great, we went hiking in the mountains. Do you like being outdoors?"],
        [
            "Yes, I go camping with my brother every summer.",
            "Not really, I would rather stay home with a book.",
            "The mountains are beautiful in autumn.",
            "I had the pasta, it was a bit too salty.",
            "My computer broke down yesterday.",
        ],
    ),
    "A broken laptop": (
        ["My laptop gets so hot that I can't touch it.", "Oh no. Is the fan still running?"],
        [
            "It makes a loud noise and then it stops.",
            "I bought a new laptop last year.",
            "It was a hot summer, wasn't it?",
            "She is a fan of that band.",
            "We adopted a dog from the shelter.",
        ],
    ),
    "What to cook": (
        [
            "What are you having for dinner tonight?",
            "No idea yet. I only have rice and some vegetables.",
            "You could make something spicy with that!",
        ],
        [
            "Good idea, I love a hot curry.",
            "I usually have breakfast at eight.",
            "Rice is grown in many countries.",
            "The train was late again this morning.",
            "Congratulations on your new job!",
        ],
    ),
}
